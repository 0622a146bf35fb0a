"""Every card of the library: front matter, sections, sentences that stand alone, numbers that carry a source."""

from __future__ import annotations

import re
from pathlib import Path

import frontmatter
import pytest

from trainer.corpus.cards import SECTIONS, sentences

FOLDER = Path(__file__).resolve().parent.parent / "tui" / "library" / "cards"
CARDS = sorted(FOLDER.glob("*.md"))
MANDATORY = {"概述", "表现", "处理", "转诊"}
UNIT = (
    r"℃|mg|μg|g|kg|ml|L|mmol|kPa|mm|cm|%|IU|单位|次/分|次|岁|个月|月龄|周|天|日|小时|分钟|秒|滴|喷|片|袋|勺|倍|日龄|度"
)
NUMBER_WITH_UNIT = re.compile(rf"\d+(?:\.\d+)?(?:～\d+(?:\.\d+)?)?\s*(?:{UNIT})")
CITATION = re.compile(r"\[\^([\w.-]+)\]")
HEADING = re.compile(r"^## +(.+?) *$", re.MULTILINE)


def _sections(post: frontmatter.Post) -> dict[str, str]:
    pieces = HEADING.split(post.content)
    return {name: body.strip() for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def _card(path: Path) -> frontmatter.Post:
    return frontmatter.loads(path.read_text(encoding="utf-8"))


def test_there_are_at_least_eighty_cards() -> None:
    assert len(CARDS) >= 80


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_front_matter(path: Path) -> None:
    meta = _card(path).metadata
    assert set(meta) == {"id", "title", "english", "ages", "synonyms", "symptoms", "asked", "red_flags", "sources"}
    assert meta["id"] == path.stem
    assert all(isinstance(meta[key], str) and meta[key].strip() for key in ("title", "english", "ages"))
    assert 3 <= len(meta["synonyms"]) <= 16
    assert 10 <= len(meta["symptoms"]) <= 26
    assert 3 <= len(meta["red_flags"]) <= 6
    assert set(meta["asked"]) == set(_sections(_card(path)))
    assert all(4 <= len(questions) <= 10 for questions in meta["asked"].values())
    for source in meta["sources"]:
        assert set(source) == {"key", "title", "edition", "organisation"}
        assert all(isinstance(value, str) and value.strip() for value in source.values())


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_sections_and_sentences(path: Path) -> None:
    sections = _sections(_card(path))
    assert list(sections) == [name for name in SECTIONS if name in sections]
    assert set(sections) >= MANDATORY
    assert len(sections) >= 5
    for name, body in sections.items():
        assert "\n" not in body, f"{name} has more than one paragraph"
        spoken = sentences(body)
        assert 1 <= len(spoken) <= 6, name
        assert "".join(spoken) == CITATION.sub("", body).strip(), f"{name} does not end with 。"
        for sentence in spoken:
            assert 8 <= len(sentence) <= 90, sentence
            assert not sentence.startswith(("它", "这", "上述", "其", "此")), f"does not stand alone: {sentence}"


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_number_with_a_unit_stands_in_a_paragraph_that_cites(path: Path) -> None:
    post = _card(path)
    defined = {source["key"] for source in post.metadata["sources"]}  # type: ignore[index]
    used: set[str] = set()
    for name, body in _sections(post).items():
        cited = set(CITATION.findall(body))
        used |= cited
        if NUMBER_WITH_UNIT.search(body):
            assert cited, f"{name}: {NUMBER_WITH_UNIT.search(body)} has no source"
    assert used == defined


def test_names_and_synonyms_belong_to_one_card_only() -> None:
    owners: dict[str, str] = {}
    for path in CARDS:
        meta = _card(path).metadata
        for name in {str(meta["title"]), *map(str, meta["synonyms"])}:  # type: ignore[arg-type]
            assert owners.setdefault(name, path.stem) == path.stem, f"{name}: {owners[name]} and {path.stem}"
