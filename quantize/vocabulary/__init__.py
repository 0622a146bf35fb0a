"""The tokenizer of a checkpoint folder as GGUF vocabulary: byte-level BPE and SentencePiece.

What llama.cpp would tokenise differently is refused; `reference_ids` lets an export prove that nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quantize.architectures import Value
from quantize.errors import BadInput
from quantize.run_folder import read_object
from quantize.vocabulary import bpe, template
from quantize.vocabulary.pieces import Pieces
from quantize.vocabulary.settings import Settings, open_tokenizer
from quantize.vocabulary.template import without_generation_tags

__all__ = ["Vocabulary", "read", "reference_ids", "without_generation_tags"]


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Pieces):
    """Everything the GGUF says about tokenising.

    `eos` is the token that ends an answer: the one the chat template writes there, whatever the tokenizer names (the
    tokenizers of base models name the end of a document). `other_end` is the tokenizer's where it is another one.
    """

    eos: int
    other_end: int | None
    chat_template: str

    def metadata(self) -> dict[str, Value]:
        """The vocabulary under its GGUF keys."""
        values: dict[str, Value] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.eos_token_id": self.eos,
            # llama.cpp takes id 11, an ordinary token, for a missing bos; a control token that is never added is safe.
            "tokenizer.ggml.bos_token_id": next(i for i in (self.bos, self.pad, self.eos) if i is not None),
            "tokenizer.ggml.add_bos_token": self.add_bos,
            "tokenizer.ggml.add_eos_token": False,
            "tokenizer.chat_template": self.chat_template,
        }
        if self.merges:
            values["tokenizer.ggml.merges"] = self.merges
        if self.scores:
            values["tokenizer.ggml.scores"] = self.scores
            values["tokenizer.ggml.add_space_prefix"] = self.add_space_prefix
        for key, number in (("padding", self.pad), ("unknown", self.unk), ("eot", self.other_end)):
            if number is not None:
                values[f"tokenizer.ggml.{key}_token_id"] = number
        return values


def read(folder: Path, vocab_size: int, chat_template: str | None = None) -> Vocabulary:
    """The tokenizer of a checkpoint folder, padded to the embedding's `vocab_size` rows.

    `chat_template` replaces the folder's own. Raises BadInput for every construction that llama.cpp would tokenise
    differently, and for a folder without a usable chat template or end of turn.
    """
    settings = Settings.read(folder)
    found = template.find(settings, chat_template)
    try:
        pieces, found = _pieces(folder, settings, vocab_size, found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder}: the tokenizer's files are damaged ({error!r}); download them or save the tokenizer again."
        ) from error
    if found is None:
        raise template.missing(folder)
    if pieces.eos is None:
        raise BadInput(
            f"{folder / 'tokenizer_config.json'} names no eos_token: generation would never stop. Name the token that "
            "ends an answer."
        )
    named = {"bos_token": pieces.bos, "eos_token": pieces.eos, "pad_token": pieces.pad, "unk_token": pieces.unk}
    special = {name: pieces.tokens[number] for name, number in named.items() if number is not None}
    prepared = template.prepared(folder, found, special)
    ending = template.turn_end(folder, prepared, list(pieces.control))
    eos = pieces.eos if ending is None else pieces.control[ending]
    other = pieces.eos if pieces.eos != eos else None
    given = {field.name: getattr(pieces, field.name) for field in fields(pieces)}
    return Vocabulary(**{**given, "eos": eos, "other_end": other, "chat_template": prepared})


def reference_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids of plain texts by the folder's own tokenizer library, without special tokens: what llama.cpp must give.

    Needs neither torch nor transformers. Texts must not spell out special tokens, and for a vocabulary with `nfc` be
    composed already.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        return [found.ids for found in open_tokenizer(file).encode_batch_fast(texts, add_special_tokens=False)]
    from quantize.vocabulary import sentencepiece

    return sentencepiece.encode(folder / "tokenizer.model", texts)


def _pieces(folder: Path, settings: Settings, rows: int, found: str | None) -> tuple[Pieces, str | None]:
    """The vocabulary and the chat template, which for Baichuan's chat models may come with this program."""
    file, sentences = folder / "tokenizer.json", folder / "tokenizer.model"
    if not file.is_file() and not sentences.is_file():
        raise BadInput(
            f"{folder} holds neither tokenizer.json nor tokenizer.model; download the whole checkpoint, or save a fast "
            "tokenizer there with transformers."
        )
    source: dict[str, Any] = read_object(file) if file.is_file() else {}
    model = source.get("model") or {}
    if source and model.get("type") != "BPE":
        raise BadInput(
            f"{file}: the model is {model.get('type')}; only BPE, byte-level or SentencePiece, can be exported."
        )
    if source and not model.get("byte_fallback"):
        pieces = bpe.read(file, source, settings, rows)
        open_tokenizer(file)  # what its own library cannot read is said now, not after the model was loaded
        return pieces, found
    # Only here: these need the packages sentencepiece and protobuf.
    from quantize.vocabulary import sentencepiece
    from trainer.prompts import baichuan_template

    proto = sentencepiece.load(sentences) if sentences.is_file() else sentencepiece.derived(file, source, settings)
    if source:
        sentencepiece.compare(file, proto, source)
    found = found or sentencepiece.role_template(folder, proto, baichuan_template())
    return sentencepiece.read(folder, proto, settings, rows, found), found
