"""A Hugging Face `tokenizer.json` with byte-level BPE (Qwen, Llama 3, and every vocabulary of our own)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf.vocab import bytes_to_unicode  # type: ignore[attr-defined]

from quantize.errors import BadInput
from quantize.vocabulary import pretokenizers
from quantize.vocabulary.pieces import CONTROL, NORMAL, USER, Pieces, filled
from quantize.vocabulary.settings import Settings

# A byte-level vocabulary writes each byte as a letter; no character that Unicode assigns contains these bytes.
_NEVER = {0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
_LETTERS = {letter for byte, letter in bytes_to_unicode().items() if byte not in _NEVER}
_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def read(file: Path, source: dict[str, Any], settings: Settings, rows: int) -> Pieces:
    """The vocabulary of a parsed tokenizer.json, padded to the embedding's rows.

    Raises BadInput for every construction that llama.cpp would tokenise differently.
    """
    model = source["model"]
    nfc = _normalizer(file, source.get("normalizer"))
    tokens, types = filled(file, _tokens(file, source), rows)
    merges = _merges(file, model.get("merges") or [])
    for key in _OPTIONS:
        if model.get(key):
            raise BadInput(
                f"{file}: the BPE option {key}={model[key]!r} has no counterpart in llama.cpp; this tokenizer cannot "
                "be exported."
            )
    pre = pretokenizers.recognise(source.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if pre is None:
        raise BadInput(
            f"{file}: the pre-tokenizer is not one llama.cpp knows ({', '.join(pretokenizers.NAMES)}); every text "
            "would be split differently than in training. Train the tokenizer with the Qwen2 expression, and with "
            "ignore_merges off."
        )
    first = _added_first(file, source.get("post_processor"))
    ids = {token: number for number, token in enumerate(tokens)}
    if first is not None and first not in ids:
        raise BadInput(f"{file}: the post-processor adds {first!r}, which is no token; save the tokenizer again.")
    bos = settings.special("bos_token", ids)
    return Pieces(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        scores=[],
        bos=bos if first is None else ids[first],
        eos=settings.special("eos_token", ids),
        pad=settings.special("pad_token", ids),
        unk=None,
        add_bos=first is not None or (settings.add_bos and bos is not None),
        add_space_prefix=False,
        nfc=nfc,
    )


def _normalizer(file: Path, normalizer: dict[str, Any] | None) -> bool:
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise BadInput(
            f"{file}: the normalizer {normalizer.get('type')} has no counterpart in llama.cpp; use NFC or none."
        )
    return normalizer is not None


def _tokens(file: Path, source: dict[str, Any]) -> dict[int, tuple[str, int]]:
    vocabulary = source["model"].get("vocab") or {}
    by_id = {number: (text, NORMAL) for text, number in vocabulary.items()}
    if len(by_id) < len(vocabulary):
        shared = len(vocabulary) - len(by_id)
        raise BadInput(f"{file}: {shared} tokens have the id of another one; save the tokenizer again.")
    if missing := _LETTERS - set(vocabulary):
        raise BadInput(
            f"{file}: {len(missing)} of {len(_LETTERS)} byte tokens are missing, so some characters could not be read; "
            "train it with the byte-level alphabet."
        )
    for added in source.get("added_tokens") or []:
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise BadInput(
                f"{file}: the added token {added['content']!r} strips its neighbours; llama.cpp does not. Set its "
                "lstrip, rstrip and single_word to false."
            )
        control = added.get("special") or re.fullmatch(r"<\|.*\|>", added["content"])
        by_id[added["id"]] = (added["content"], CONTROL if control else USER)
    return by_id


def _merges(file: Path, given: list[str] | list[list[str]]) -> list[str]:
    """One line per merge; a space inside a part is written as its byte-level letter, as llama.cpp reads it."""
    if not given:
        raise BadInput(
            f"{file} holds no merges; llama.cpp cannot use a BPE vocabulary without them. Save the tokenizer again."
        )
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in given]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise BadInput(f"{file}: a merge does not have two parts; the file is damaged, save the tokenizer again.")
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]


def _added_first(file: Path, post_processor: dict[str, Any] | None) -> str | None:
    """The token that the tokenizer puts before every text. Anything else it adds is refused."""
    given = post_processor or {}
    steps = given.get("processors") or [] if given.get("type") == "Sequence" else [given]
    steps = [step for step in steps if step and step.get("type") != "ByteLevel"]
    if not steps:
        return None
    if len(steps) == 1 and steps[0].get("type") == "TemplateProcessing":
        single = [next(iter(part.items())) for part in steps[0].get("single") or []]
        kinds = [kind for kind, _ in single]
        if kinds == ["Sequence"]:
            return None
        if kinds == ["SpecialToken", "Sequence"]:
            return single[0][1]["id"]
    raise BadInput(
        f"{file}: the post-processor {given.get('type')} adds more than one token before a text; the chat template "
        "alone may do that. Save the tokenizer with no post-processor but ByteLevel."
    )
