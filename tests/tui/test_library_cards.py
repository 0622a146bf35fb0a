"""Cards are read strictly: what is wrong is named with its file."""

import time
from pathlib import Path

import pytest

from tui.library import LibraryError
from tui.library.cards import CARDS, load_cards, read_card, sentences

SAMPLE = Path(__file__).parent / "cards" / "fever.md"


def test_sentences_lose_citations_and_keep_their_full_stop() -> None:
    assert sentences("甲是一。乙是二，丙。[^a][^b]\n") == ("甲是一。", "乙是二，丙。")


def test_card_has_sections_in_order_with_the_sources_cited_there() -> None:
    card = read_card(SAMPLE)
    assert list(card.sections) == ["概述", "表现", "处理", "家庭护理", "转诊"]
    assert card.sections["转诊"] == ("3个月以下婴儿发热要立即转诊。", "发热伴嗜睡要立即转诊。")
    assert [source.organisation for source in card.citations["处理"]] == ["世界卫生组织"]
    assert "发烧" in card.names


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("id: fever", "id: other", "file name"),
        ("title: 发热", "title: ''", "'title'"),
        ("[发烧, 高烧, 烧, fever]", "[发烧, 39]", "'synonyms'"),
        ("## 处理", "## 治法", "'治法'"),
        ("## 表现", "## 概述", "'概述'"),
        ("[^who]", "[^nobody]", "'nobody'"),
        ("edition:", "year:", "edition"),
        ("title: 发热", "title: [发热", "YAML"),
        ("---\nid", "id", "front matter"),
        ("发热是身体", "发热\u202e是身体", "U+202E"),
        ("[发烧,", '["\\e[2J",', "U+001B"),
    ],
)
def test_broken_card_names_file_and_cause(tmp_path: Path, old: str, new: str, cause: str) -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "fever.md"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(LibraryError) as caught:
        load_cards(tmp_path)
    assert "fever.md" in str(caught.value)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


def test_card_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fever.md"
    path.write_bytes(SAMPLE.read_text(encoding="utf-8").encode("gb18030"))
    with pytest.raises(LibraryError, match=r"fever\.md: is not UTF-8"):
        load_cards(tmp_path)


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="no cards"):
        load_cards(tmp_path)


def test_shipped_cards_load_quickly() -> None:
    load_cards(SAMPLE.parent)  # imports are not what is measured
    begin = time.process_time()
    cards = load_cards(CARDS)
    assert (time.process_time() - begin) / len(cards) < 0.3 / 110 * 3  # three times the goal: CI machines are slow
