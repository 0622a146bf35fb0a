"""What two rooms must agree on without importing each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer import prompts
from trainer.corpus.cards import load_cards as trained_cards
from tui.engine.contract import DEFAULT_PROMPTS, Prompts
from tui.library.cards import CARDS, load_cards
from tui.library.search import Passage
from tui.quoting import cite_line

INSTRUCT = Path(prompts.__file__).parent / "instruct.json"


def test_the_apps_fall_back_prompts_are_a_copy() -> None:
    assert DEFAULT_PROMPTS.read_bytes() == INSTRUCT.read_bytes()


def test_both_rooms_read_the_same_sentences_from_every_card() -> None:
    shown = load_cards()
    for card in trained_cards(CARDS):
        assert {name: section.sentences for name, section in card.sections.items()} == dict(shown[card.id].sections)


@pytest.mark.parametrize("task", ["knowledge", "diagnosis", "treatment"])
def test_the_app_writes_what_the_model_was_trained_on(task: str) -> None:
    raw = prompts.prompts()
    app = Prompts.of(raw)
    card = trained_cards(CARDS)[0]
    sections = list(card.sections.values())[:3]
    written = "".join(app.passage(n, s.title, s.section, s.sentences) for n, s in enumerate(sections, 1))
    assert app.question("怎么办", written) == prompts.user("怎么办", sections)
    assert app.system(task) == prompts.system(task)
    passage = Passage(2, card.id, sections[1].title, sections[1].section, sections[1].sentences, (), (), 1.0)
    assert prompts.answer(2, sections[1], ()) == cite_line(app.phrases, passage)
