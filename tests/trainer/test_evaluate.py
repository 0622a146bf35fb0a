"""How answers are judged: only whole sentences of a right card and section count."""

from __future__ import annotations

from typing import Any

import pytest

from trainer import prompts
from trainer.corpus.cards import load_cards
from trainer.evaluate.embedded import CARDS, Question, gates, judge, library_sentences, load_questions, table

LIBRARY = {"甲。": {("fever", "处理")}, "乙。": {("fever", "预防")}, "丙。": {("cough", "处理")}}
QUESTION = Question(id="1", kind="named", question="?", task="knowledge", card="fever", also=(), sections=("处理",))


def _answer(text: str, **changes: Any) -> dict[str, Any]:
    base = {"answer": text, "cards": ["fever"], "refused": False, "stop_reason": "eos", "seconds": 0.1}
    return {**base, **changes}


@pytest.mark.parametrize(
    ("text", "right_card", "on_topic"),
    [
        ("您先别着急。\n根据发热·处理[1]：\n甲。\n如果孩子情况变差，请及时就医。\n", True, True),
        ("根据发热·处理[1]：\n甲。\n乙。\n", True, False),
        ("根据发热·处理[1]：\n甲。\n丙。\n", False, False),
        ("根据发热·处理[1]：\n甲\n", False, False),  # not the whole sentence
        ("自己编的一句话。", False, False),
        (prompts.prompts()["phrases"]["refusal"], False, False),
    ],
)
def test_what_counts_as_on_topic(text: str, right_card: bool, on_topic: bool) -> None:
    judged = judge(QUESTION, _answer(text), LIBRARY)
    assert (judged.right_card, judged.on_topic) == (right_card, on_topic)


def test_loops_and_truncations_are_counted() -> None:
    assert judge(QUESTION, _answer("甲。\n甲。\n"), LIBRARY).looped
    assert judge(QUESTION, _answer("甲。", stop_reason="length"), LIBRARY).truncated


def test_the_table_divides_by_the_right_numbers() -> None:
    outside = Question(id="2", kind="out_of_scope", question="?", task="knowledge", card=None, also=(), sections=())
    judged = [
        judge(QUESTION, _answer("甲。"), LIBRARY),
        judge(QUESTION, _answer("丙。", cards=["cough", "a", "b", "fever"]), LIBRARY),
        judge(outside, _answer("", refused=True), LIBRARY),
    ]
    figures = table(judged)
    assert figures["retrieved_named"] == 0.5
    assert figures["on_topic"] == 0.5
    assert figures["refusal"] == 1.0
    assert not gates(figures)["on_topic"]
    assert gates(figures)["refusal"]


@pytest.mark.parametrize("name", ["test", "development"])
def test_the_question_sets_are_sound(name: str) -> None:
    cards = {card.id: card for card in load_cards(CARDS)}
    questions = load_questions(name)
    for question in questions:
        assert question.cards <= set(cards)
        assert bool(question.card) == (question.kind != "out_of_scope")
        if question.card:
            assert question.sections
    assert len({question.id for question in questions}) == len(questions)


def test_the_test_set_is_large_enough_and_apart_from_development() -> None:
    test, development = load_questions("test"), load_questions("development")
    kinds = [question.kind for question in test]
    assert kinds.count("named") + kinds.count("symptoms") >= 200
    assert kinds.count("out_of_scope") >= 50
    assert not {q.question for q in test} & {q.question for q in development}


def test_the_library_of_sentences_holds_every_card() -> None:
    places = {card for pairs in library_sentences().values() for card, _ in pairs}
    assert places == {card.id for card in load_cards(CARDS)}
