"""The words of a question: normalised text, bigrams, the section asked for, and whether it is about a child."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_RUN = re.compile(r"[\u3400-\u9fff]+|[a-z][a-z0-9]*")
_AGE = re.compile(r"(\d{1,3})\s*(?:多\s*)?(?:周?岁|years?)")
_QUANTITY = re.compile(r"[\d一二两三四五六七八九十半几]+\.?\d*\s*(?:个多月|个月|周岁|岁半|岁多|岁|天|周|月|度|次|年)")
_CHINESE_TENS = re.compile(r"[二三四五六七八九]十[一二三四五六七八九]?(?:多|来|几)?岁")
_ADULT = 18  # years


def normalise(text: str) -> str:
    """NFKC, lower case, without white space: full-width and half-width forms are the same."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text).lower())


def spaced(text: str) -> str:
    """Text as unicode61 must see it: every Chinese character a token of its own, ASCII words whole."""
    return " ".join(
        token
        for run in re.findall(r"[\u3400-\u9fff]+|[a-z0-9]+", unicodedata.normalize("NFKC", text).lower())
        for token in (run if run[0] > "\u33ff" else [run])
    )


def bigrams(text: str) -> set[str]:
    """Adjacent character pairs of each Chinese run, ASCII words whole, a run of one character as it is."""
    found: set[str] = set()
    for run in _RUN.findall(text):
        if run[0].isascii() or len(run) == 1:
            found.add(run)
        else:
            found.update(run[i : i + 2] for i in range(len(run) - 1))
    return found


@dataclass(frozen=True)
class Vocabulary:
    """The word lists of sections.yaml and words.yaml."""

    sections: Mapping[str, Mapping[str, Any]]  # heading -> {words, tasks}
    same: Mapping[str, str]  # dialect -> standard word
    dialect: re.Pattern[str]  # the keys of `same`
    stop: re.Pattern[str]
    child: re.Pattern[str]
    foreign: re.Pattern[str]
    around: re.Pattern[str]  # foreign words that say nothing where a child is named
    person: re.Pattern[str]  # a child, named

    def informative(self, question: str) -> set[str]:
        """The bigrams of a normalised question without stop words, ages and durations."""
        return bigrams(self.stop.sub(" ", _QUANTITY.sub(" ", question)))

    def about_child(self, question: str) -> bool:
        """A word or an age below 18 years says that the question is about a child."""
        return bool(self.child.search(question)) or any(age < _ADULT for age in _ages(question))

    def foreign_words(self, question: str) -> int:
        """How many words (or an adult age) say that the question is not about a child's illness."""
        words = set(self.foreign.findall(question))
        if not self.person.search(question):
            words |= set(self.around.findall(question))
        return len(words) + sum(age >= _ADULT for age in _ages(question))

    def standard(self, question: str) -> str:
        """The normalised question with dialect put into standard words."""
        return self.dialect.sub(lambda found: self.same[found[0]], normalise(question))

    def intent(self, question: str) -> dict[str, float]:
        """Per section 0..1: how clearly a question in standard words asks for it (the clearest asked has 1)."""
        score = {
            heading: max((len(word) ** 2 for word in entry["words"] if word in question), default=0)
            for heading, entry in self.sections.items()
        }
        best = max(score.values(), default=0)
        return {heading: value / best if best else 0.0 for heading, value in score.items()}

    def prior(self, task: str) -> dict[str, float]:
        """Per section 0..1: how much a consultation task wants it."""
        return {heading: entry["tasks"].get(task, 0.0) for heading, entry in self.sections.items()}


def _ages(question: str) -> list[int]:
    # 四十五岁: two or more tens in Chinese numerals are always adult
    return [int(age) for age in _AGE.findall(question)] + [20 for _ in _CHINESE_TENS.findall(question)]


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted((normalise(str(word)) for word in words), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


@cache
def vocabulary() -> Vocabulary:
    """Read the word lists (once per process)."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def read(name: str) -> dict[str, Any]:
        return yaml.load((_FOLDER / name).read_text(encoding="utf-8"), Loader=loader)

    words = read("words.yaml")
    return Vocabulary(
        read("sections.yaml"),
        words["same"],
        *(_pattern(words[name]) for name in ("same", "stop", "child", "foreign", "around", "person")),
    )
