"""From a search result to what quote mode may say: the passages' sentences and the model's own fixed phrases."""

from __future__ import annotations

import math
import re
from string import Template

from tui.engine.contract import Phrases, Prompts
from tui.engine.quote import QuotePassage, QuoteSpec, QuoteWeights
from tui.library import Passage, SearchResult

_ASKS_WHO = re.compile(
    "你是谁|你是什么|你到底是|你叫什么|你是医生|你是不是|你是个|你是人|你是哪|你能看病|你会看病|你能做什么|你会什么|"
    "你能当医生|你能代替|代替医生|介绍一下你|你靠谱|行医资格|机器人|人工智能|[Aa][Ii]"
)
_ASKS_PRESCRIPTION = re.compile(
    "处方|药方|(?:[给帮替](?:我|我家|娃|孩子|宝宝|他|她)*|你给?|麻烦|直接)开|开(?:个|张|点|些|一些|一?盒|一?瓶)(?:药|消炎|抗生素|头孢|阿奇)"
)


def quote_spec(prompts: Prompts, found: SearchResult, question: str, weights: QuoteWeights) -> QuoteSpec:
    """What quote mode may say: the found passages, and the model's own fixed phrases."""
    phrases = prompts.phrases
    return QuoteSpec(
        passages=tuple(
            QuotePassage(
                cite=cite_line(phrases, passage),
                weight=math.exp(passage.score / weights.search_temperature),
                sentences=tuple(sentence + "\n" for sentence in passage.sentences),
                sentence_weights=(1.0,) * len(passage.sentences),
            )
            for passage in found.passages
        ),
        refusal=phrases.refusal,
        refusal_weight=1.0 - found.confidence,
        openings=phrases.openings,
        closings=phrases.closings,
        identity=_about_itself(phrases, question),
        weights=weights,
    )


def cite_line(phrases: Phrases, passage: Passage) -> str:
    """The line that cites a passage, as the model learnt it."""
    return Template(phrases.cite).safe_substitute(number=passage.number, title=passage.title, section=passage.section)


def _about_itself(phrases: Phrases, question: str) -> str | None:
    """The phrase for a question about who answers, or for a prescription; None for any other question."""
    if _ASKS_WHO.search(question):
        return phrases.identity
    return phrases.prescription or None if _ASKS_PRESCRIPTION.search(question) else None
