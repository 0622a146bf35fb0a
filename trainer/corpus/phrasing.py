"""How people ask: many phrasings of one question, reproducible from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_FILE = Path(__file__).parent / "phrasings.yaml"
_OWN = 0.5  # share of questions that use a card's own short questions


@cache
def phrasings() -> dict[str, Any]:
    """The phrasing tables of phrasings.yaml."""
    return yaml.safe_load(_FILE.read_text(encoding="utf-8"))


class Phrasing:
    """Draws questions; `split` chooses the core phrasings (`train` or `held_out`)."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng = rng
        self.split = split
        self.tables = phrasings()

    def named(self, section: str, name: str, asked: Sequence[str] = ()) -> str:
        """A question about one section of a named card; `asked` are the card's own short questions to it."""
        rng = self.rng
        if asked and self.split == "train" and rng.random() < _OWN:
            core = rng.choice(self.tables["own"]["named"]).format(d=name, q=rng.choice(asked))
        else:
            core = rng.choice(self.tables["sections"][section][self.split]).format(d=name)
        if rng.random() < 0.3:
            core = self._who() + rng.choice(["", "，", " "]) + core
        return self._finish(core, keep=name)

    def symptoms(self, symptoms: Sequence[str], asked: Mapping[str, Sequence[str]]) -> tuple[str, str]:
        """A description without a name; returns the question and the section that answers it."""
        rng = self.rng
        if asked and self.split == "train" and rng.random() < _OWN:
            section = rng.choice(list(asked))
            template = rng.choice(self.tables["own"]["symptoms"])
            question = template.format(s=self._describe(symptoms), q=rng.choice(asked[section]))
            return self._finish(question), section
        template = rng.choice(self.tables["symptoms"][self.split])
        return self._finish(template["ask"].format(s=self._describe(symptoms))), template["section"]

    def complaint(self, symptoms: Sequence[str]) -> str:
        """The first thing a parent says in a diagnosis dialogue."""
        return self._finish(self._describe(symptoms))

    def reply(self, symptoms: Sequence[str]) -> tuple[str, str]:
        """A parent's answer to a question back, with a new request and the section that answers it."""
        symptom = self.rng.choice(symptoms)
        follow_up = self.rng.choice(self.tables["follow_ups"])
        reply = self.rng.choice(self.tables["replies"]).format(s=symptom)
        return self._finish(f"{reply}，{follow_up['ask']}"), follow_up["section"]

    def special(self, kind: str) -> str:
        """An identity, prescription or out-of-scope question."""
        return self._finish(self.rng.choice(self.tables[kind][self.split]))

    def _who(self) -> str:
        who = self.rng.choice(self.tables["who"])
        return who + self.rng.choice(self.tables["ages"]) if self.rng.random() < 0.4 else who

    def _describe(self, symptoms: Sequence[str]) -> str:
        count = min(len(symptoms), self.rng.choice([1, 2, 2, 3]))
        parts = self.rng.sample(symptoms, count)
        duration = self.rng.choice(self.tables["durations"])
        who = self._who() if self.rng.random() < 0.6 else ""
        described = self.rng.choice(["，", "、", "，还", "，也", " "]).join(parts)
        return f"{who}{described}{'，' + duration if duration else ''}"

    def _finish(self, core: str, keep: str = "") -> str:
        """Adds greeting and ending, dialect and slips; `keep` (the name) is rarely touched."""
        rng, tables = self.rng, self.tables
        text = rng.choice(tables["prefixes"]) + core + rng.choice(tables["suffixes"])
        for standard, variant in tables["dialect"]:
            if standard in text and standard not in keep and rng.random() < 0.06:
                text = text.replace(standard, variant, 1)
        for right, wrong in tables["typos"]:
            if right in text and (right not in keep or rng.random() < 0.1) and rng.random() < 0.02:
                text = text.replace(right, wrong, 1)
        if rng.random() < 0.03 and len(text) > 6:
            at = rng.randrange(1, len(text))
            text = text[:at] + text[at - 1] + text[at:]
        return text
