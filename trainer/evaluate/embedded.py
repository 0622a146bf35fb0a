"""The embedded model's table: what is found, what is answered, what is refused.

The questions (questions/*.jsonl) were written by people who saw the cards' names only, not their text, the training
phrasings or the search words; the test set was never looked at while anything was tuned. A model is measured through
`pediatricsgpt ask --batch`, as its users meet it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from trainer import prompts
from trainer.corpus.cards import load_cards
from trainer.recipe import PROJECT, load_recipe

QUESTIONS = Path(__file__).parent / "questions"
CARDS = PROJECT / "tui" / "library" / "cards"
RECIPE = PROJECT / "trainer" / "recipes" / "embedded.yaml"
MODES = ("quote", "grounded", "free")
# The acceptance limits; they hold for quote mode, the embedded model's default.
GATES = {
    "retrieved_named": 0.95,
    "retrieved_symptoms": 0.75,
    "on_topic": 0.85,
    "refusal": 0.90,
    "loops": 0,
    "truncated": 0,
}


_CITE = re.compile(r"根据.+\[\d\]：")


class EvaluationError(RuntimeError):
    """The app did not answer the questions; the message carries its reason."""


class Question(BaseModel):
    """One held-out question; `card` and `also` are the right cards, `sections` the ones that answer it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    kind: str
    question: str
    task: str
    card: str | None
    also: tuple[str, ...]
    sections: tuple[str, ...]

    @property
    def cards(self) -> set[str]:
        """Every card that is a right one."""
        return {self.card, *self.also} - {None}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Judged:
    """One answer held against its question."""

    question: Question
    answer: dict[str, Any]
    retrieved: bool
    right_card: bool
    on_topic: bool
    looped: bool
    truncated: bool


def load_questions(name: str) -> list[Question]:
    """The questions of one set (`test` or `development`)."""
    lines = (QUESTIONS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Question.model_validate_json(line) for line in lines]


def ask(questions: Iterable[Question], mode: str, model: Path | None) -> list[dict[str, Any]]:
    """Answers of the app, in order; raises EvaluationError with the app's own message."""
    with tempfile.TemporaryDirectory() as folder:
        batch, answers = Path(folder) / "questions.jsonl", Path(folder) / "answers.jsonl"
        rows = [{"id": q.id, "question": q.question, "task": q.task, "mode": mode} for q in questions]
        batch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        command = [sys.executable, "-m", "pediatricsgpt", "ask", "--batch", str(batch), "--output", str(answers)]
        if model:
            command += ["--model", str(model)]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", check=False)
        if result.returncode:
            raise EvaluationError(f"the app could not answer ({result.returncode}): {result.stderr.strip()[-500:]}")
        return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]


def judge(question: Question, answer: dict[str, Any], library: dict[str, set[tuple[str, str]]]) -> Judged:
    """Holds one answer against its question; `library` maps a sentence to the (card, section) pairs it stands in."""
    fixed = {line for line in _fixed_lines() if line}
    lines = [line.strip() for line in answer["answer"].splitlines() if line.strip()]
    content = [line for line in lines if line not in fixed and not _CITE.fullmatch(line)]
    places = [library.get(line, set()) for line in content]
    right_card = bool(places) and all(any(card in question.cards for card, _ in place) for place in places)
    on_topic = bool(places) and all(
        any(card in question.cards and section in question.sections for card, section in place) for place in places
    )
    return Judged(
        question=question,
        answer=answer,
        retrieved=bool(question.cards & set(answer["cards"][:3])),
        right_card=right_card,
        on_topic=on_topic,
        looped=len(lines) != len(set(lines)),
        truncated=answer["stop_reason"] != "eos",
    )


def _fixed_lines() -> set[str]:
    phrases = prompts.prompts()["phrases"]
    texts = [phrases["refusal"], phrases["identity"], phrases["prescription"], *phrases["openings"]]
    return {line.strip() for text in [*texts, *phrases["closings"]] for line in text.splitlines()}


def library_sentences() -> dict[str, set[tuple[str, str]]]:
    """Every sentence of the cards with the places where it stands."""
    places: dict[str, set[tuple[str, str]]] = {}
    for card in load_cards(CARDS):
        for section in card.sections.values():
            for sentence in section.sentences:
                places.setdefault(sentence, set()).add((card.id, section.section))
    return places


def table(judged: list[Judged]) -> dict[str, float]:
    """The figures of one mode; shares in 0..1, `loops` and `truncated` are counts."""
    new_cards = set(load_recipe(RECIPE).corpus.held_out_cards)
    named = [j for j in judged if j.question.kind == "named"]
    symptoms = [j for j in judged if j.question.kind == "symptoms"]
    in_scope = named + symptoms
    outside = [j for j in judged if j.question.kind == "out_of_scope"]
    added = [j for j in in_scope if j.question.card in new_cards]
    return {
        "questions": len(judged),
        "retrieved_named": _share(named, lambda j: j.retrieved),
        "retrieved_symptoms": _share(symptoms, lambda j: j.retrieved),
        "right_card": _share(in_scope, lambda j: j.right_card),
        "on_topic": _share(in_scope, lambda j: j.on_topic),
        "on_topic_named": _share(named, lambda j: j.on_topic),
        "on_topic_symptoms": _share(symptoms, lambda j: j.on_topic),
        "on_topic_new_cards": _share(added, lambda j: j.on_topic),
        "refusal": _share(outside, lambda j: j.answer["refused"]),
        "wrongly_refused": _share(in_scope, lambda j: j.answer["refused"]),
        "loops": sum(j.looped for j in judged),
        "truncated": sum(j.truncated for j in judged),
        "seconds_per_answer": round(sum(j.answer["seconds"] for j in judged) / max(1, len(judged)), 3),
    }


def _share(judged: list[Judged], holds: Callable[[Judged], bool]) -> float:
    return round(sum(map(holds, judged)) / len(judged), 4) if judged else 0.0


def gates(figures: dict[str, float]) -> dict[str, bool]:
    """Which of the acceptance limits hold."""
    return {
        name: figures[name] <= limit if name in ("loops", "truncated") else figures[name] >= limit
        for name, limit in GATES.items()
    }
