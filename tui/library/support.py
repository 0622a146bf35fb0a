"""What a free answer may say because a passage says it: wording by character pairs, numbers with units exactly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tui.library.words import bigrams, normalise

_UNIT = (
    r"mg/kg/d|mg/kg|ml/kg/h|ml/kg|g/kg|μg/kg|ug/kg|mmol/l|mg/dl|g/l|mg|μg|ug|kg|ml|mm|cm|iu|kpa|kcal|g|l|%|°c|度|"
    r"次/分|次/分钟|次|个月|月龄|月|岁|周|天|日|小时|分钟|分|秒|片|粒|包|袋|滴|支|单位|毫克|毫升|公斤|克|升|毫米|厘米|倍"
)
_DIGITS = r"\d+(?:\.\d+)?|[一二两三四五六七八九十半]+"
_QUANTITY = re.compile(rf"({_DIGITS})(?:(?:~|-|—+|–|至|到)({_DIGITS}))?({_UNIT})")
_SENTENCE = re.compile(r"[^。！？!?\n]+[。！？!?]*")
_SHARE = 0.6  # of a sentence's character pairs must stand in the passage
_SHORTEST = 6  # characters; less says nothing that needs support


def sentences(text: str) -> list[str]:
    """Split free text into sentences, without surrounding white space."""
    return [part.strip() for part in _SENTENCE.findall(text) if part.strip()]


def quantities(text: str) -> set[tuple[str, str]]:
    """All (number, unit) pairs of a text; a range 10～15mg/kg gives both of its ends."""
    found: set[tuple[str, str]] = set()
    for low, high, unit in _QUANTITY.findall(normalise(text)):
        found.update((number, unit) for number in (low, high) if number)
    return found


def unsupported(text: str, passages: Iterable[Sequence[str]], known: Iterable[str] = ()) -> tuple[str, ...]:
    """The sentences of a text that no single passage supports.

    `passages` are lists of sentences. A passage supports a sentence when it contains most of its character pairs and
    every number with its unit. `known` are fixed phrases that need no support.
    """
    sources = [(bigrams(normalise("".join(lines))), quantities("".join(lines))) for lines in passages]
    fixed = {normalise(part) for phrase in known for part in sentences(phrase)}
    doubtful = []
    for sentence in sentences(text):
        pairs, numbers = bigrams(normalise(sentence)), quantities(sentence)
        if normalise(sentence) in fixed or (len(sentence) < _SHORTEST and not numbers):
            continue
        supported = any(numbers <= figures and len(pairs & words) >= _SHARE * len(pairs) for words, figures in sources)
        if not supported:
            doubtful.append(sentence)
    return tuple(doubtful)
