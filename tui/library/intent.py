"""Which section a question about a named card asks for, learnt from the cards' own short questions.

A naive Bayes classifier over character n-grams: every phrase under a card's `asked`, and every word of sections.yaml,
is an example of its section. It is counted anew whenever the library is loaded: a clinic's own cards teach it too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

_RUN = re.compile(r"[\u3400-\u9fff]+|[a-z0-9]+")
_SMOOTHING = 0.3
_WORD = 3  # a word of sections.yaml counts as so many phrases
_SINGLE = 0.5  # weight of single characters beside pairs and triples
_TEMPERATURE = 4.0  # n-grams of one phrase are not independent evidence


class SectionIntent:
    """P(section | question), from examples (section, phrase) and the words of each section."""

    def __init__(self, asked: Iterable[tuple[str, str]], words: Mapping[str, Iterable[str]]) -> None:
        self._sections = tuple(words)
        self._counts: dict[str, Counter[str]] = {section: Counter() for section in self._sections}
        self._examples: Counter[str] = Counter()
        for section, phrase in asked:
            self._learn(section, phrase, 1)
        for section, phrases in words.items():
            for phrase in phrases:
                self._learn(section, phrase, _WORD)
        self._total = sum(self._counts.values(), Counter())

    def __call__(self, question: str) -> dict[str, float]:
        """Probability of each section for a question without the card's name; empty where nothing is recognised."""
        grams = [gram for gram in _grams(question) if gram in self._total]
        if not grams:
            return {}
        scores = {section: self._score(section, grams) for section in self._sections}
        top = max(scores.values())
        weights = {section: math.exp((score - top) / _TEMPERATURE) for section, score in scores.items()}
        return {section: weight / sum(weights.values()) for section, weight in weights.items()}

    def _learn(self, section: str, phrase: str, weight: int) -> None:
        self._counts[section].update(dict.fromkeys(_grams(phrase), weight))
        self._examples[section] += weight

    def _score(self, section: str, grams: Iterable[str]) -> float:
        """Σ log P(gram | section) / P(gram)."""
        spread = _SMOOTHING * len(self._sections)
        here, everywhere = self._examples[section] + spread, self._examples.total() + spread * len(self._sections)
        return sum(
            (_SINGLE if len(gram) == 1 else 1.0)
            * math.log((self._counts[section][gram] + _SMOOTHING) / here * everywhere / (self._total[gram] + spread))
            for gram in grams
        )


def _grams(text: str) -> set[str]:
    return {run[i : i + n] for run in _RUN.findall(text) for n in (1, 2, 3) for i in range(len(run) - n + 1)}
