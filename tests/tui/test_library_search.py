"""What a question finds: names, synonyms, two-character words, the section asked for, and how sure it is."""

import pytest

from tui.library import Library
from tui.library.words import bigrams, normalise, spaced, vocabulary


def first(library: Library, question: str, task: str = "knowledge") -> tuple[str, str]:
    passage = library.search(question, task=task).passages[0]
    return passage.card_id, passage.section


@pytest.mark.parametrize(
    ("question", "card"),
    [
        ("水痘", "chickenpox"),  # two characters
        ("拉稀咋整", "diarrhoea"),  # synonym
        ("宝宝ＲＳＶ怎么办", "bronchiolitis"),  # full-width ASCII
        ("娃儿窜稀了", "diarrhoea"),
        ("眼窝凹陷", "diarrhoea"),  # only in the text
        ("额头摸着发烫", "fever"),  # lay symptom in other words
    ],
)
def test_right_card_comes_first(library: Library, question: str, card: str) -> None:
    result = library.search(question)
    assert result.cards[0] == card
    assert result.passages[0].card_id == card


def test_longer_name_hides_the_shorter_one_inside_it(library: Library) -> None:
    result = library.search("发热惊厥怎么处理")
    assert result.cards[0] == "febrile-seizure"
    assert {p.card_id for p in result.passages} == {"febrile-seizure"}


def test_ascii_name_inside_a_word_does_not_count(library: Library) -> None:
    assert library.search("fsync").cards == ()
    assert library.search("FS是什么").cards[0] == "febrile-seizure"


@pytest.mark.parametrize(
    ("question", "section"),
    [
        ("水痘怎么引起的", "概述"),
        ("发烧要不要去医院", "转诊"),
        ("发烧吃什么药", "处理"),
        ("发烧在家怎么护理", "家庭护理"),
        ("水痘怎么预防", "预防"),
        ("水痘有什么症状", "表现"),
    ],
)
def test_section_asked_for_comes_first(library: Library, question: str, section: str) -> None:
    assert first(library, question)[1] == section


def test_task_decides_where_the_words_do_not(library: Library) -> None:
    assert first(library, "发烧", "treatment")[1] == "处理"
    assert first(library, "发烧", "diagnosis")[1] == "表现"  # the sample card has no 判断
    assert first(library, "发烧", "knowledge")[1] == "概述"


def test_named_card_may_give_several_sections_unnamed_ones_are_spread(library: Library) -> None:
    named = library.search("水痘")
    assert [p.card_id for p in named.passages] == ["chickenpox"] * 3
    spread = library.search("全身发烫，痒得厉害，喘")
    assert len({p.card_id for p in spread.passages}) >= 2
    assert [p.number for p in spread.passages] == [1, 2, 3]


def test_confidence_separates_children_from_the_rest(library: Library) -> None:
    inside = [library.search(q).confidence for q in ("孩子发烧了怎么办", "宝宝拉肚子", "3岁出水痘了")]
    outside = [
        library.search(q).confidence
        for q in ("写一首春天的诗", "高血压吃什么药", "我45岁，发烧了", "孕妇发烧怎么办", "用python写代码", "股票涨吗")
    ]
    assert min(inside) > 0.5 > max(outside)


@pytest.mark.parametrize("question", ["", "？！", "的了吗", "123", "\u202e", "NOT AND OR", '"', "a* OR b", "发" * 5000])
def test_odd_questions_do_no_harm(library: Library, question: str) -> None:
    result = library.search(question)
    assert 0.0 <= result.confidence <= 1.0
    assert len(result.passages) <= 3


def test_bigrams_and_spacing() -> None:
    assert bigrams("发热，RSV高".lower()) == {"发热", "rsv", "高"}
    assert spaced("发热 RSV39") == "发 热 rsv39"
    assert normalise("３９ ℃") == "39°c"


def test_every_shipped_name_finds_its_card() -> None:
    library = Library.load()
    missed = [
        (name, card.id)
        for card in library.cards.values()
        for name in (card.title, *card.synonyms)
        if card.id not in library.search(f"孩子{name}怎么办").cards
    ]
    names = sum(1 + len(card.synonyms) for card in library.cards.values())
    assert len(missed) <= 0.02 * names, missed


def test_vocabulary_knows_ages() -> None:
    words = vocabulary()
    assert words.about_child("3岁发烧")
    assert not words.about_child("35岁发烧")
    assert words.foreign_words("35岁发烧") == 1
    assert words.foreign_words("3岁发烧") == 0


@pytest.mark.parametrize(
    ("question", "card"),
    [
        ("孩子吃了奶奶的降压药怎么办", "poisoning"),
        ("孩子吃了奶奶的降压药，叫不醒", "poisoning"),
        ("宝宝吞了手机电池", "swallowed-foreign-body"),
        ("诗诗发烧39度", "fever"),
        ("奶奶带的孩子发烧抽搐了", "febrile-seizure"),
        ("娃在摩托车上摔下来撞到头", "head-injury"),
    ],
)
def test_people_and_things_around_a_child_do_not_make_it_foreign(question: str, card: str) -> None:
    found = Library.load().search(question)
    assert card in found.cards
    assert found.confidence > 0.5


@pytest.mark.parametrize(
    "question", ["我奶奶咳嗽半个月吃什么药", "老公打呼噜怎么治", "我爸降压药吃哪种", "写一首关于小孩的诗"]
)
def test_adults_and_poems_stay_foreign(question: str) -> None:
    assert Library.load().search(question).confidence < 0.5
