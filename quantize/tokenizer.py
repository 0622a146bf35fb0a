"""A Hugging Face `tokenizer.json` (byte-level BPE) as GGUF vocabulary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from gguf.vocab import bytes_to_unicode  # type: ignore[attr-defined]

from quantize.architectures import Value
from quantize.errors import BadInput
from quantize.run_folder import read_object

# The text-splitting expressions llama.cpp has hard-coded, by its name for them. A model tokenised with
# another expression would load and read every sentence slightly wrong, so an unknown one is refused.
_PRE_TOKENIZERS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
_GENERATION_TAG = re.compile(r"(?m)(^[ \t]*)?\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}(\n)?")


@dataclass(frozen=True)
class Vocabulary:
    """Everything the GGUF says about tokenising; `tokens` has exactly as many entries as the embedding has rows."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos: int
    pad: int | None
    bos: int | None
    chat_template: str
    nfc: bool

    @property
    def control(self) -> dict[str, int]:
        """Control token texts and their ids."""
        return {t: i for i, (t, kind) in enumerate(zip(self.tokens, self.types, strict=True)) if kind == _CONTROL}

    def metadata(self) -> dict[str, Value]:
        """The vocabulary under its GGUF keys."""
        values: dict[str, Value] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.merges": self.merges,
            "tokenizer.ggml.eos_token_id": self.eos,
            # llama.cpp takes id 11, an ordinary token, for a missing bos; a control token that is never added is safe.
            "tokenizer.ggml.bos_token_id": next(i for i in (self.bos, self.pad, self.eos) if i is not None),
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": self.chat_template,
        }
        if self.pad is not None:
            values["tokenizer.ggml.padding_token_id"] = self.pad
        return values


_NORMAL, _CONTROL = int(TokenType.NORMAL), int(TokenType.CONTROL)
_USER, _UNUSED = int(TokenType.USER_DEFINED), int(TokenType.UNUSED)


def read(folder: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer of a checkpoint folder, padded to the embedding's `vocab_size` rows.

    Raises BadInput for every construction that llama.cpp would tokenise differently.
    """
    file = folder / "tokenizer.json"
    source = read_object(file)
    settings = read_object(folder / "tokenizer_config.json")
    model = source.get("model") or {}
    if model.get("type") != "BPE":
        raise BadInput(f"{file}: the model is {model.get('type')}; only byte-level BPE tokenizers can be exported.")
    nfc = _normalizer(file, source.get("normalizer"))
    tokens, types = _tokens(file, source, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    if not merges:
        raise BadInput(f"{file} holds no merges; llama.cpp cannot use a BPE vocabulary without them.")
    _refuse_bpe_options(file, model, source.get("post_processor"))
    ids = {token: number for number, token in enumerate(tokens)}

    def special(key: str) -> int | None:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and text not in ids:
            raise BadInput(f"{folder / 'tokenizer_config.json'}: {key} {text!r} is not in the vocabulary.")
        return None if text is None else ids[text]

    eos = special("eos_token")
    if eos is None:
        raise BadInput(f"{folder / 'tokenizer_config.json'} names no eos_token: generation would never stop.")
    if settings.get("add_bos_token"):
        raise BadInput(
            f"{folder / 'tokenizer_config.json'}: add_bos_token is not supported; the chat format has no bos."
        )
    return Vocabulary(
        pre=_pre_tokenizer(file, source.get("pre_tokenizer")),
        tokens=tokens,
        types=types,
        merges=merges,
        eos=eos,
        pad=special("pad_token"),
        bos=special("bos_token"),
        chat_template=without_generation_tags(_chat_template(folder, settings)),
        nfc=nfc,
    )


def without_generation_tags(template: str) -> str:
    """The chat template without `{% generation %}`, a tag only Hugging Face's Jinja knows.

    A tag that trims whitespace (`{%-`) becomes an empty comment that trims the same, so the rendering is unchanged.
    """

    def replace(match: re.Match[str]) -> str:
        indent, left, right, newline = (
            match.group(1) or "",
            match.group(2),
            match.group(3),
            match.group(4) or "",
        )
        return f"{indent}{{#{left} {right}#}}{newline}" if left or right else ""

    return _GENERATION_TAG.sub(replace, template)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    # Hugging Face lets the file win over the configuration; so must the export.
    file = folder / "chat_template.jinja"
    try:
        template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 ({error}); train the run again.") from error
    if not isinstance(template, str) or not template:
        raise BadInput(f"{folder} has no chat template; without one every answer would be in the wrong format.")
    return template


def _normalizer(file: Path, normalizer: dict[str, Any] | None) -> bool:
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise BadInput(
            f"{file}: the normalizer {normalizer.get('type')} has no counterpart in llama.cpp; use NFC or none."
        )
    return normalizer is not None


def _pre_tokenizer(file: Path, pre: dict[str, Any] | None) -> str:
    steps = (pre or {}).get("pretokenizers") or []
    if (
        (pre or {}).get("type") == "Sequence"
        and [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and steps[0].get("behavior") == "Isolated"
        and not steps[0].get("invert")
        and not steps[1].get("add_prefix_space")
        and not steps[1].get("use_regex")
    ):
        name = _PRE_TOKENIZERS.get((steps[0].get("pattern") or {}).get("Regex", ""))
        if name is not None:
            return name
    raise BadInput(
        f"{file}: the pre-tokenizer is not one llama.cpp knows ({', '.join(_PRE_TOKENIZERS.values())}); every text "
        "would be split differently than in training. Train the tokenizer with the Qwen2 expression."
    )


def _tokens(file: Path, source: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    by_id: dict[int, tuple[str, int]] = {}
    for text, number in source["model"].get("vocab", {}).items():
        by_id[number] = (text, _NORMAL)
    if missing := set(bytes_to_unicode().values()) - set(source["model"].get("vocab", {})):
        raise BadInput(f"{file}: {len(missing)} of 256 byte tokens are missing; train it with the byte-level alphabet.")
    for added in source.get("added_tokens") or []:
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise BadInput(f"{file}: the added token {added['content']!r} strips its neighbours; llama.cpp does not.")
        control = added.get("special") or re.fullmatch(r"<\|.*\|>", added["content"])
        by_id[added["id"]] = (added["content"], _CONTROL if control else _USER)
    if not by_id or max(by_id) >= vocab_size:
        raise BadInput(
            f"{file} has ids up to {max(by_id, default=-1)}, the embedding has {vocab_size} rows; they differ."
        )
    entries = [by_id.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(vocab_size)]
    tokens = [text for text, _ in entries]
    if len(set(tokens)) != len(tokens):
        raise BadInput(f"{file} holds the same token text under two ids; llama.cpp would abort on it.")
    return tokens, [kind for _, kind in entries]


def _refuse_bpe_options(file: Path, model: dict[str, Any], post_processor: dict[str, Any] | None) -> None:
    for key in (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        if model.get(key):
            raise BadInput(f"{file}: the BPE option {key}={model[key]!r} has no counterpart in llama.cpp.")
    kind = (post_processor or {}).get("type", "ByteLevel")
    if kind != "ByteLevel" and not (kind == "TemplateProcessing" and not (post_processor or {}).get("special_tokens")):
        raise BadInput(f"{file}: the post-processor {kind} adds tokens; the chat template alone may do that.")
