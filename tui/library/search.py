"""Search over the cards: SQLite FTS5 on character tokens, names, lay symptoms and the section asked for.

A question is scored against every section of every card (a *passage*). Three kinds of evidence add up: a name of the
card in the question, the wording (bm25 over adjacent character pairs), and how clearly the question or the task
asks for the section. All numbers that weigh them stand in `SearchWeights`.
"""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tui.library.cards import CARDS, Card, Source, load_cards
from tui.library.intent import SectionIntent
from tui.library.words import bigrams, normalise, spaced, vocabulary

Key = TypeVar("Key", str, tuple[str, str])
_MOST_PHRASES = 100
_CLEAR = 0.6  # share of a lay symptom phrase that counts as describing it clearly


@dataclass(frozen=True)
class Passage:
    """One section of one card, as found for a question; `number` is its number in the prompt (1..n)."""

    number: int
    card_id: str
    title: str
    section: str
    sentences: tuple[str, ...]
    sources: tuple[Source, ...]
    red_flags: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class SearchResult:
    """Passages for the prompt, the best card ids in order, and the confidence (0..1) of being in scope."""

    passages: tuple[Passage, ...]
    cards: tuple[str, ...]
    confidence: float


@dataclass(frozen=True)
class SearchWeights:
    """What each kind of evidence counts; to be tuned on a development set, never on the test set."""

    # bm25 columns
    column_names: float = 6.0
    column_symptoms: float = 5.0
    column_section: float = 1.0
    column_body: float = 1.0
    # combined score of a passage (wording is scaled to 0..1 within a question)
    wording: float = 1.0  # of the card's best section
    row: float = 0.3  # of the section itself
    symptom: float = 0.6  # best lay symptom phrase: share of it that the question contains
    named: float = 1.5  # a name of the card stands in the question ...
    named_floor: float = 0.4  # ... times at least this, when the name is a word that many cards use
    intent: float = 1.0
    plain: float = 0.25  # share of it for the words of asking in a question that names no card
    asked: float = 0.15  # best of the section's own short questions: share of it that the question contains
    prior: float = 0.5  # of the consultation task for the section
    repeat: float = 0.4  # taken off for each passage already chosen from the same card ...
    repeat_named: float = 0.1  # ... when its name stands in the question
    # confidence: a logistic function, fitted on the development questions
    bias: float = -2.9
    sure_named: float = 1.35  # times how telling the name is
    sure_name: float = 1.25  # any name at all
    sure_known: float = (
        2.1  # information (in bigrams no other card has) that the best card shares with the question ...
    )
    most_known: float = 2.5  # ... up to this, so that foreign words outweigh any amount of it
    sure_symptom: float = 0.6
    sure_child: float = 0.7
    sure_foreign: float = -3.2


class Library:
    """All cards in memory and the index over them."""

    def __init__(self, cards: dict[str, Card], weights: SearchWeights | None = None) -> None:
        self.cards = cards
        self.weights = weights or SearchWeights()
        self._rows = [(card, heading) for card in cards.values() for heading in card.sections]
        self._names: dict[str, set[str]] = defaultdict(set)  # normalised name -> card ids
        self._lay: list[tuple[str, str]] = []  # (card id, one lay symptom, normalised)
        self._knows: dict[str, set[str]] = defaultdict(set)  # bigram -> ids of the cards that contain it
        for card in cards.values():
            for name in card.names:
                self._names[normalise(name)].add(card.id)
            self._lay += [(card.id, normalise(symptom)) for symptom in card.symptoms]
            texts = [*card.names, *card.symptoms, *card.red_flags]
            texts += [phrase for phrases in card.asked.values() for phrase in phrases]
            for bigram in bigrams(normalise("，".join(texts + ["".join(s) for s in card.sections.values()]))):
                self._knows[bigram].add(card.id)
        words = vocabulary()
        self._phrases = [(card_id, bigrams(symptom)) for card_id, symptom in self._lay]
        self._asked = [
            ((card.id, heading), words.informative(normalise(phrase)))
            for card in cards.values()
            for heading, phrases in card.asked.items()
            for phrase in phrases
        ]
        self._intent = SectionIntent(
            ((heading, words.standard(phrase)) for card in cards.values() for heading, phrases in card.asked.items()
             for phrase in phrases),
            {heading: map(str, entry["words"]) for heading, entry in words.sections.items()},
        )  # fmt: skip
        self._index = self._build()

    @classmethod
    def load(cls, folder: Path | None = None, weights: SearchWeights | None = None) -> Library:
        """Read every card of a folder (default: the shipped cards); raises LibraryError."""
        return cls(load_cards(folder or CARDS), weights)

    def passage(self, card_id: str, section: str, number: int = 1, score: float = 0.0) -> Passage:
        """One section of a card as a passage; raises KeyError when there is none."""
        card = self.cards[card_id]
        sources = card.citations[section] or card.sources
        return Passage(number, card.id, card.title, section, card.sections[section], sources, card.red_flags, score)

    def search(
        self, question: str, limit: int = 3, *, task: str = "knowledge", earlier: Sequence[str] = ()
    ) -> SearchResult:
        """The best passages for a question (of one consultation task), numbered from 1 in order of score.

        `earlier` questions of the same consultation add evidence; what is asked for stands in the question.
        """
        words, weights = vocabulary(), self.weights
        text = normalise("，".join([*earlier, question]))
        asked = words.informative(text)
        named = self._named(text, asked)
        symptom = self._shares(self._phrases, asked)
        wording = self._wording(asked)
        own = self._shares(self._asked, words.informative(normalise(question)))
        evidence = {
            card: weights.named * named.get(card, 0.0) + weights.symptom * symptom.get(card, 0.0) for card in self.cards
        }
        intent, prior = self._wanted(question, named), words.prior(task)
        if any(intent.values()) and task == "knowledge":
            prior = {}
        # What speaks for a card counts for all its sections; what tells its sections apart comes on top.
        whole: dict[str, float] = {}
        for row, share in wording.items():
            card_id = self._rows[row][0].id
            whole[card_id] = max(share, whole.get(card_id, 0.0))
        scores: dict[tuple[str, str], float] = {}
        for row, (card, heading) in enumerate(self._rows):
            base = evidence[card.id] + weights.wording * whole.get(card.id, 0.0)
            if base > 0:
                scores[card.id, heading] = (
                    base
                    + weights.row * wording.get(row, 0.0)
                    + weights.intent * intent.get(heading, 0.0)
                    + weights.asked * own.get((card.id, heading), 0.0)
                    + weights.prior * prior.get(heading, 0.0)
                )
        best: dict[str, float] = {}
        for (card_id, _), score in scores.items():
            best[card_id] = max(score, best.get(card_id, 0.0))
        cards = tuple(sorted(best, key=lambda card_id: (-best[card_id], card_id))[:3])
        passages = tuple(
            self.passage(card_id, heading, number, round(score, 4))
            for number, (card_id, heading, score) in enumerate(self._choose(scores, named, limit), 1)
        )
        confidence = self._confidence(text, asked, named, symptom, cards)
        return SearchResult(passages, cards, round(confidence, 4))

    def _wanted(self, question: str, named: dict[str, float]) -> dict[str, float]:
        """Section -> 0..1: how clearly the question asks for it.

        Where a card is named, the rest of the question is what is asked. A description without a name is mostly about
        what is seen, which says little about what is wanted: there only the plain words of asking count.
        """
        text = vocabulary().standard(question)
        if not named:
            asked = vocabulary().intent(text)
            return {heading: self.weights.plain * share for heading, share in asked.items()}
        for name in sorted((name for name in self._names if name in text), key=len, reverse=True):
            text = text.replace(name, " ")
        return self._intent(text)

    def _without_names(self, text: str, symptom: dict[str, float]) -> str:
        """The question without names of cards, nor words of a card whose lay symptom it clearly describes.

        What the library itself speaks of (儿童免疫程序, 八岁不到来月经) is not foreign to it.
        """
        own = [name for name in self._names if len(name) > 1 and name in text]
        clear = {card for card, share in symptom.items() if share >= _CLEAR}
        own += [phrase for card, phrase in self._lay if card in clear and bigrams(phrase) & bigrams(text)]
        found = vocabulary().foreign.findall(text)
        for word in found:
            if any(word in phrase for phrase in own):
                text = text.replace(word, " ")
        return text

    def _build(self) -> sqlite3.Connection:
        index = sqlite3.connect(":memory:", check_same_thread=False)
        index.execute(
            "CREATE VIRTUAL TABLE passage USING fts5"
            "(names, symptoms, section, body, tokenize='unicode61 remove_diacritics 0')"
        )
        sections = vocabulary().sections
        index.executemany(
            "INSERT INTO passage(rowid, names, symptoms, section, body) VALUES (?, ?, ?, ?, ?)",
            (
                (
                    row,
                    # "x" keeps the last character of one phrase and the first of the next apart
                    " x ".join(map(spaced, card.names)),
                    " x ".join(map(spaced, card.symptoms)),
                    " x ".join(map(spaced, [heading, *sections[heading]["words"], *card.asked.get(heading, ())])),
                    spaced("".join(card.sections[heading])),
                )
                for row, (card, heading) in enumerate(self._rows)
            ),
        )
        return index

    def _wording(self, asked: set[str]) -> dict[int, float]:
        """Row number -> bm25 of the question's bigrams, scaled so that the best row has 1."""
        weights = self.weights
        columns = (weights.column_names, weights.column_symptoms, weights.column_section, weights.column_body)
        # SQLite limits the depth of a query, and a long story is told by its rarest words.
        telling = sorted((b for b in asked if b in self._knows), key=lambda b: (-self._rarity(b), b))[:_MOST_PHRASES]
        if not telling:
            return {}
        query = " OR ".join(f'"{spaced(bigram)}"' for bigram in telling)
        found = self._index.execute(
            "SELECT rowid, -bm25(passage, ?, ?, ?, ?) FROM passage WHERE passage MATCH ?", (*columns, query)
        ).fetchall()
        best = max((score for _, score in found), default=0.0)
        return {row: score / best for row, score in found} if best > 0 else {}

    def _named(self, text: str, asked: set[str]) -> dict[str, float]:
        """Card id -> 0..1 for each name standing in the question; a name inside a longer name does not count."""
        spans = [(start, start + len(name), name) for name in self._names for start in _occurrences(name, text)]
        found: dict[str, float] = {}
        known = asked & self._knows.keys()  # what the library has never heard of (a nickname) does not count
        for start, end, name in spans:
            if any(a <= start and end <= b and b - a > end - start for a, b, _ in spans):
                continue
            # A word most cards use (发热) tells little, unless it is all the question says.
            pairs = bigrams(name)
            rare = self._information(pairs) / len(pairs) if len(name) > 1 and pairs else 0.0
            whole = len(asked & pairs) / len(known) if known else 1.0
            strength = max(self.weights.named_floor, rare, whole)
            for card_id in self._names[name]:
                found[card_id] = max(strength, found.get(card_id, 0.0))
        return found

    def _shares(self, phrases: Iterable[tuple[Key, set[str]]], asked: set[str]) -> dict[Key, float]:
        """Key -> 0..1: the largest share of one of its phrases (by information) that the question contains."""
        found: dict[Key, float] = {}
        for key, phrase in phrases:
            if common := phrase & asked:
                found[key] = max(self._information(common) / self._information(phrase), found.get(key, 0.0))
        return found

    def _rarity(self, bigram: str) -> float:
        """0 for a bigram that every card contains, 1 for one that no card contains."""
        return math.log((1 + len(self.cards)) / (1 + len(self._knows.get(bigram, ())))) / math.log(1 + len(self.cards))

    def _information(self, words: Iterable[str]) -> float:
        """How much a set of bigrams tells: the sum of their rarities."""
        return sum(map(self._rarity, words))

    def _choose(
        self, scores: dict[tuple[str, str], float], named: dict[str, float], limit: int
    ) -> list[tuple[str, str, float]]:
        """Greedy choice; each further passage of the same card must beat the others by `repeat`."""
        weights = self.weights
        cost = {card: weights.repeat_named if card in named else weights.repeat for card in self.cards}
        taken: dict[str, int] = defaultdict(int)
        chosen: list[tuple[str, str, float]] = []
        rest = dict(scores)
        while rest and len(chosen) < limit:
            key = max(rest, key=lambda item: (rest[item] - cost[item[0]] * taken[item[0]], item))
            chosen.append((*key, rest.pop(key)))
            taken[key[0]] += 1
        return chosen

    def _confidence(
        self,
        text: str,
        asked: set[str],
        named: dict[str, float],
        symptom: dict[str, float],
        cards: tuple[str, ...],
    ) -> float:
        """0..1: how sure it is that the library can answer (name, known wording, child, foreign words)."""
        words, weights = vocabulary(), self.weights
        known = [self._information(b for b in asked if card in self._knows.get(b, ())) for card in cards]
        logit = (
            weights.bias
            + weights.sure_named * max(named.values(), default=0.0)
            + weights.sure_name * bool(named)
            + weights.sure_known * min(max(known, default=0.0), weights.most_known)
            + weights.sure_symptom * max(symptom.values(), default=0.0)
            + weights.sure_child * bool(words.person.search(text))
            + weights.sure_foreign * words.foreign_words(self._without_names(text, symptom))
        )
        return 1.0 / (1.0 + math.exp(-logit)) if cards else 0.0


def _occurrences(name: str, text: str) -> list[int]:
    """Where a name stands in a text; an ASCII name (RSV) only as a whole word."""
    found, start = [], text.find(name)
    while start >= 0:
        before, after = text[start - 1 : start], text[start + len(name) : start + len(name) + 1]
        glued = name.isascii() and any(c.isascii() and c.isalnum() for c in before + after)
        if not glued:
            found.append(start)
        start = text.find(name, start + 1)
    return found
