"""From a search result to what quote mode may say: the passages' sentences and the model's own fixed phrases."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from string import Template

from tui.engine.contract import Phrases, Prompts
from tui.engine.quote import QuotePassage, QuoteSpec, QuoteWeights
from tui.library import Passage, SearchResult

_ASKS_WHO = re.compile(
    r"你是谁|你是什么|你到底是|你叫什么|你是医生|你是不是|你是个|你是人|你是真人|你是哪|你能看病|你会看病|你能做什么|"
    r"你会什么|你能当医生|代替医生|介绍一下你|你靠谱|你有行医|你[^，。！？\s]{0,4}(?:机器人|人工智能|AI|ai)"
)
# Asking for a prescription; a medicine that a doctor has already given (开了) is another matter.
_ASKS_PRESCRIPTION = re.compile(
    r"(?:开|写|出|签)[^了过，。！？\s]{0,4}(?:处方|药方)|"
    r"(?:给|帮|替|你|麻烦|直接|请)[^，。！？\s]{0,6}开[^了过，。！？\s]{0,4}(?:药|抗生素|头孢|阿奇)"
)


def quote_spec(prompts: Prompts, found: SearchResult, question: str, weights: QuoteWeights) -> QuoteSpec:
    """What quote mode may say: the found passages, and the model's own fixed phrases."""
    phrases = prompts.phrases
    return QuoteSpec(
        passages=tuple(
            QuotePassage(
                cite=cite_line(phrases, passage),
                weight=share,
                sentences=tuple(sentence + "\n" for sentence in passage.sentences),
                sentence_weights=(1.0,) * len(passage.sentences),
            )
            for passage, share in zip(found.passages, _shares(found.passages, weights), strict=True)
        ),
        refusal=phrases.refusal,
        refusal_weight=_refusal(found.confidence, weights.certainty),
        openings=phrases.openings,
        closings=phrases.closings,
        identity=_about_itself(phrases, question),
        weights=weights,
    )


def _shares(passages: Sequence[Passage], weights: QuoteWeights) -> list[float]:
    """Prior weight of each passage: its card's best score, and how far the section lies below it."""
    best: dict[str, float] = {}
    for passage in passages:
        best[passage.card_id] = max(passage.score, best.get(passage.card_id, -math.inf))
    top = max(best.values(), default=0.0)
    return [
        math.exp(
            (best[passage.card_id] - top) / weights.card_temperature
            + (passage.score - best[passage.card_id]) / weights.section_temperature
        )
        for passage in passages
    ]


def _refusal(confidence: float, certainty: float) -> float:
    """Prior of refusing: 1 - confidence, sharpened."""
    inside, outside = confidence**certainty, (1.0 - confidence) ** certainty
    return outside / (inside + outside)


def cite_line(phrases: Phrases, passage: Passage) -> str:
    """The line that cites a passage, as the model learnt it."""
    return Template(phrases.cite).safe_substitute(number=passage.number, title=passage.title, section=passage.section)


def _about_itself(phrases: Phrases, question: str) -> str | None:
    """The phrase for a question about who answers, or for a prescription; None for any other question."""
    if _ASKS_WHO.search(question):
        return phrases.identity
    return phrases.prescription or None if _ASKS_PRESCRIPTION.search(question) else None
