"""Grounded dialogues: passages in the context, an answer made from the right one, its number cited.

What the small model must learn is to *read*: match the name in the question with a passage's title and the
way of asking with its section. So contexts vary without end: distractors from the same card and from others,
shortened passages, and illnesses renamed to made-up names (`_rename`), so that knowing cards by heart does not help.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from trainer import prompts
from trainer.corpus.cards import Card, Section
from trainer.corpus.phrasing import Phrasing
from trainer.corpus.record import Task
from trainer.tokenizer import gb2312_level1

TASK_SECTIONS: dict[Task, tuple[str, ...]] = {
    "knowledge": ("概述", "表现", "预防", "转诊"),
    "diagnosis": ("判断", "表现", "转诊"),
    "treatment": ("处理", "家庭护理", "转诊"),
}
MAX_SENTENCES = 4
_CHARACTERS = gb2312_level1()


@dataclass(frozen=True)
class Turn:
    """A user question with its passages and the plain answer (`cited` is 0 for a fixed phrase)."""

    question: str
    passages: tuple[Section, ...]
    cited: int
    sentences: tuple[str, ...] = ()
    phrase: str = ""

    def answer(self, rng: random.Random, humane: float) -> str:
        """The answer's text; with probability `humane` each, an opening and a referring closing are added."""
        if self.phrase:
            return prompts.prompts()["phrases"][self.phrase]
        phrases = prompts.prompts()["phrases"]
        opening = rng.choice(phrases["openings"]) if rng.random() < humane * 0.5 else ""
        closing = rng.choice(phrases["closings"]) if rng.random() < humane else ""
        return prompts.answer(self.cited, self.passages[self.cited - 1], self.sentences, opening, closing)


class DialogueBuilder:
    """Draws turns about `cards`, with distractors from `others`."""

    def __init__(self, cards: list[Card], others: list[Card], rng: random.Random, split: str) -> None:
        self.cards = cards
        self.others = others
        self.rng = rng
        self.phrasing = Phrasing(rng, "train" if split != "held_out_questions" else "held_out")
        self.rename = split == "train"

    def knowledge(self) -> tuple[Task, Card, list[Turn]]:
        """One named or described question of the knowledge task."""
        return self._single("knowledge", described=0.2)

    def treatment(self) -> tuple[Task, Card, list[Turn]]:
        """One question of the treatment task."""
        return self._single("treatment", described=0.3)

    def diagnosis(self) -> tuple[Task, Card, list[Turn]]:
        """Evidence gathering: complaint → what to ask and look for → reply → what fits, what to do."""
        card = self._card(lambda c: "判断" in c.sections and len(c.symptoms) >= 2)
        if self.rng.random() < 0.5:
            return self._single("diagnosis", described=0.6)
        turns = [self._turn(card, "判断", self.phrasing.complaint(card.symptoms))]
        for _ in range(self.rng.choice([0, 1, 1, 2])):
            question, section = self.phrasing.reply(card.symptoms)
            if section in card.sections:
                turns.append(self._turn(card, section, question))
        return "diagnosis", card, turns

    def refusal(self) -> tuple[Task, Card, list[Turn]]:
        """A question that no passage answers: another illness, or nothing a children's library holds."""
        card = self._card()
        if self.rng.random() < 0.5:
            question = self.phrasing.special("out_of_scope")
        else:
            section = self.rng.choice(list(card.sections))
            name = self._made_up_name() if self.rename else self.rng.choice(card.names)
            question = self.phrasing.named(section, name, card.asked.get(section, ()))
        passages = self._distractors(
            card, self.rng.choice(list(card.sections)), self.rng.choice([1, 2, 3]), same_card=False
        )
        return (
            self.rng.choice(list(TASK_SECTIONS)),
            card,
            [Turn(question, tuple(passages), 0, phrase="refusal")],
        )

    def special(self, kind: str) -> tuple[Task, Card, list[Turn]]:
        """An identity or prescription question; the passages in the context must not distract."""
        card = self._card()
        passages = self._distractors(
            card, self.rng.choice(list(card.sections)), self.rng.choice([0, 1, 3]), same_card=True
        )
        turn = Turn(self.phrasing.special(kind), tuple(passages), 0, phrase=kind)
        return self.rng.choice(list(TASK_SECTIONS)), card, [turn]

    def _single(self, task: Task, described: float) -> tuple[Task, Card, list[Turn]]:
        if self.rng.random() < described:
            card = self._card(lambda c: bool(c.symptoms))
            question, section = self.phrasing.symptoms(card.symptoms, card.asked)
            if section in card.sections:
                return task, card, [self._turn(card, section, question, rename=False)]
        wanted = TASK_SECTIONS[task] if self.rng.random() < 0.7 else tuple(self.phrasing.tables["sections"])
        card = self._card(lambda c: bool(set(wanted) & set(c.sections)))
        section = self.rng.choice([name for name in wanted if name in card.sections])
        name = card.title if self.rng.random() < 0.7 else self.rng.choice(card.names)
        return (
            task,
            card,
            [self._turn(card, section, self.phrasing.named(section, name, card.asked.get(section, ())), name=name)],
        )

    def _turn(self, card: Card, section: str, question: str, name: str = "", rename: bool = True) -> Turn:
        """The right passage among distractors, in random order."""
        target = card.sections[section]
        count = self.rng.choice([0, 1, 2, 2, 2])
        passages = [target, *self._distractors(card, section, count, same_card=True)]
        if self.rename and self.rng.random() < 0.8:
            passages = [self._shorten(passage) for passage in passages]
        if self.rename and rename and name and self.rng.random() < 0.5:
            new = self._made_up_name()
            question = question.replace(name, new)
            passages = [self._rename(p, card.title, new) if p.card_id == card.id else p for p in passages]
        right = passages[0]
        self.rng.shuffle(passages)
        number = next(index for index, passage in enumerate(passages, 1) if passage is right)
        return Turn(question, tuple(passages), number, right.sentences[:MAX_SENTENCES])

    def _distractors(self, card: Card, section: str, count: int, same_card: bool) -> list[Section]:
        """Other sections of the same card, and sections (often the same one) of other cards."""
        chosen: list[Section] = []
        while len(chosen) < count:
            if same_card and self.rng.random() < 0.5:
                options = [s for name, s in card.sections.items() if name != section]
            else:
                other = self.rng.choice(self.others)
                if other.id == card.id:
                    continue
                same = other.sections.get(section)
                options = [same] if same and self.rng.random() < 0.6 else list(other.sections.values())
            candidate = self.rng.choice(options)
            if all((candidate.card_id, candidate.section) != (s.card_id, s.section) for s in chosen):
                chosen.append(candidate)
        return chosen

    def _card(self, fits: Callable[[Card], bool] = lambda card: True) -> Card:
        while True:
            card = self.rng.choice(self.cards)
            if fits(card):
                return card

    def _shorten(self, section: Section) -> Section:
        keep = self.rng.choice([1, 1, 2])
        return replace(section, sentences=section.sentences[:keep])

    def _rename(self, section: Section, old: str, new: str) -> Section:
        renamed = tuple(sentence.replace(old, new) for sentence in section.sentences)
        return replace(section, title=new, sentences=renamed)

    def _made_up_name(self) -> str:
        stem = "".join(self.rng.choice(_CHARACTERS) for _ in range(self.rng.randint(1, 4)))
        return stem + self.rng.choice(["", "", "", "病", "炎", "症", "热", "疹", "综合征", "外伤", "中毒"])
