"""Which of llama.cpp's hard-coded ways to split a text a `tokenizer.json` asks for.

A model whose text is split otherwise than in training loads, and reads every sentence slightly wrong. llama.cpp's
converter goes by a hash of some encoded text, which no vocabulary of one's own can be in. Here the steps themselves
are compared, literally: each entry is proven with a vocabulary whose ids are known (tests/quantize/test_vocabulary.py).
"""

from __future__ import annotations

import json
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"

_Step = dict[str, Any]


def _split(expression: str) -> _Step:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> _Step:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES, _GPT2 = _byte_level(use_regex=False), _byte_level(use_regex=True)
_LLAMA3 = [_split(_WORDS + r"|\p{N}{1,3}" + _REST), _BYTES]

# (llama.cpp's name, steps, ignore_merges: whether a whole word that is a token needs no merges)
_KNOWN: tuple[tuple[str, list[_Step], bool], ...] = (
    ("qwen2", [_split(_WORDS + r"|\p{N}" + _REST), _BYTES], False),
    ("qwen35", [_split(_MARKS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"), _BYTES], False),
    ("llama-bpe", _LLAMA3, True),
    ("smaug-bpe", _LLAMA3, False),
    ("gpt-2", [_GPT2], False),
    ("starcoder", [_DIGITS, _GPT2], False),
    (
        "deepseek-coder",
        [*map(_split, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")), _DIGITS, _BYTES],
        False,
    ),
)

NAMES = tuple(name for name, _, _ in _KNOWN)


def recognise(pre_tokenizer: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """llama.cpp's name for the `pre_tokenizer` of a tokenizer.json, or None."""
    given = pre_tokenizer or {}
    steps = given.get("pretokenizers") or [] if given.get("type") == "Sequence" else [given]
    return _BY_STEPS.get((_canonical(steps), ignore_merges))


def _canonical(steps: list[_Step]) -> str:
    """The steps with defaults written out and without what changes offsets only."""
    written = []
    for step in steps:
        step = dict(step)
        if step.get("type") == "ByteLevel":
            step.pop("trim_offsets", None)
            step.setdefault("use_regex", True)
        if step.get("type") == "Split":
            step.setdefault("invert", False)
        written.append(step)
    return json.dumps(written, sort_keys=True)


_BY_STEPS = {(_canonical(steps), ignore_merges): name for name, steps, ignore_merges in _KNOWN}
