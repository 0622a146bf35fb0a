"""Grounded dialogues: passages in the context, an answer made from the right one, its number cited.

What the small model must learn is to *read*: match the name in the question with a passage's title and the
way of asking with its section. So contexts vary without end: distractors from the same card and from others,
shortened passages, and illnesses renamed to made-up names (`_renamed`), so that knowing cards by heart does not help.
"""

from __future__ import annotations

import random
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
_WHOLE = 0.25  # share of training contexts with whole passages, as the app shows them
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
        """The answer's text, with a referring closing at probability `humane` and an opening at half of it."""
        if self.phrase:
            return prompts.prompts()["phrases"][self.phrase]
        phrases = prompts.prompts()["phrases"]
        opening = rng.choice(phrases["openings"]) if rng.random() < humane * 0.5 else ""
        closing = rng.choice(phrases["closings"]) if rng.random() < humane else ""
        return prompts.answer(self.cited, self.passages[self.cited - 1], self.sentences, opening, closing)


# the prompt's task, the card it is about, the turns
Drawn = tuple[Task, Card, list[Turn]]


class DialogueBuilder:
    """Draws turns about `cards`, with distractors from `others`.

    `headings_only` makes selection exercises: passages without text and answers that are the citation alone, so that
    choosing the passage is all there is to learn, at a fraction of the tokens.
    """

    def __init__(
        self, cards: list[Card], others: list[Card], rng: random.Random, split: str, headings_only: bool = False
    ) -> None:
        self.cards = cards
        self.others = others
        self.rng = rng
        self.phrasing = Phrasing(rng, "train" if split != "held_out_questions" else "held_out")
        self.vary = split == "train"
        self.headings_only = headings_only

    def knowledge(self) -> Drawn:
        """One named or described question of the knowledge task."""
        return self._single("knowledge", described=0.2)

    def treatment(self) -> Drawn:
        """One question of the treatment task."""
        return self._single("treatment", described=0.3)

    def diagnosis(self) -> Drawn:
        """Evidence gathering: complaint → what to ask and look for → reply → what fits, what to do."""
        able = [card for card in self.cards if "判断" in card.sections]
        if self.headings_only or not able or self.rng.random() < 0.5:
            return self._single("diagnosis", described=0.6)
        card = self.rng.choice(able)
        turns = [self._turn(card, "判断", self.phrasing.complaint(card.symptoms))]
        for _ in range(self.rng.choice([0, 1, 1, 2])):
            question, section = self.phrasing.reply(card.symptoms)
            if section in card.sections:
                turns.append(self._turn(card, section, question))
        return "diagnosis", card, turns

    def refusal(self) -> Drawn:
        """A question that no passage answers: another illness, or nothing a children's library holds."""
        card = self.rng.choice(self.cards)
        section = self.rng.choice(list(card.sections))
        if self.rng.random() < 0.5:
            question = self.phrasing.special("out_of_scope")
        else:
            name = self._made_up_name() if self.vary else self.rng.choice(card.names)
            question = self.phrasing.named(section, name, card.asked.get(section, ()))
        passages = self._dress(self._distractors(card, section, self.rng.choice([1, 2, 3]), same_card=False))
        return self.rng.choice(list(TASK_SECTIONS)), card, [Turn(question, passages, 0, phrase="refusal")]

    def special(self, kind: str) -> Drawn:
        """An identity or prescription question; the passages in the context must not distract."""
        card = self.rng.choice(self.cards)
        section = self.rng.choice(list(card.sections))
        passages = self._dress(self._distractors(card, section, self.rng.choice([1, 2, 3]), same_card=True))
        turn = Turn(self.phrasing.special(kind), passages, 0, phrase=kind)
        return self.rng.choice(list(TASK_SECTIONS)), card, [turn]

    def _single(self, task: Task, described: float) -> Drawn:
        card = self.rng.choice(self.cards)
        if self.rng.random() < described:
            question, section = self.phrasing.symptoms(card.symptoms, card.asked)
            if section in card.sections:
                return task, card, [self._turn(card, section, question)]
        wanted = [name for name in TASK_SECTIONS[task] if name in card.sections and self.rng.random() < 0.9]
        section = self.rng.choice(wanted or list(card.sections))
        name = card.title if self.rng.random() < 0.7 else self.rng.choice(card.names)
        question = self.phrasing.named(section, name, card.asked.get(section, ()))
        return task, card, [self._turn(card, section, question, name=name)]

    def _turn(self, card: Card, section: str, question: str, name: str = "") -> Turn:
        """The right passage among distractors, in random order; a `name` in the question may be made up anew."""
        count = self.rng.choice([1, 2, 3, 4, 5] if self.headings_only else [0, 1, 2, 2, 2])
        passages = [card.sections[section], *self._distractors(card, section, count, same_card=True)]
        passages = list(self._dress(passages))
        if self.vary and name and self.rng.random() < 0.5:
            new = self._made_up_name()
            question = question.replace(name, new)
            passages = [_renamed(p, card.title, new) if p.card_id == card.id else p for p in passages]
        right = passages[0]
        self.rng.shuffle(passages)
        number = next(index for index, passage in enumerate(passages, 1) if passage is right)
        return Turn(question, tuple(passages), number, right.sentences[:MAX_SENTENCES])

    def _distractors(self, card: Card, section: str, count: int, same_card: bool) -> list[Section]:
        """Up to `count` other sections of the same card and sections (often the same one) of other cards."""
        chosen: list[Section] = []
        for _ in range(4 * count):
            if same_card and len(card.sections) > 1 and self.rng.random() < 0.5:
                options = [passage for name, passage in card.sections.items() if name != section]
            else:
                other = self.rng.choice(self.others)
                if other.id == card.id:
                    continue
                same = other.sections.get(section)
                options = [same] if same and self.rng.random() < 0.6 else list(other.sections.values())
            candidate = self.rng.choice(options)
            if len(chosen) < count and candidate not in chosen:
                chosen.append(candidate)
        return chosen

    def _dress(self, passages: list[Section]) -> tuple[Section, ...]:
        """The passages as a training context shows them: headings alone, mostly shortened, sometimes whole."""
        if self.headings_only:
            return tuple(replace(passage, sentences=()) for passage in passages)
        if not self.vary or self.rng.random() < _WHOLE:
            return tuple(passages)
        return tuple(replace(p, sentences=p.sentences[: self.rng.choice([1, 1, 2])]) for p in passages)

    def _made_up_name(self) -> str:
        stem = "".join(self.rng.choice(_CHARACTERS) for _ in range(self.rng.randint(1, 4)))
        return stem + self.rng.choice(["", "", "", "病", "炎", "症", "热", "疹", "综合征", "外伤", "中毒"])


def _renamed(section: Section, old: str, new: str) -> Section:
    renamed = tuple(sentence.replace(old, new) for sentence in section.sentences)
    return replace(section, title=new, sentences=renamed)
