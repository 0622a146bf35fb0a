"""What both kinds of tokenizer come down to in a GGUF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf import TokenType

from quantize.errors import BadInput

NORMAL, UNKNOWN, CONTROL = int(TokenType.NORMAL), int(TokenType.UNKNOWN), int(TokenType.CONTROL)
USER, UNUSED, BYTE = int(TokenType.USER_DEFINED), int(TokenType.UNUSED), int(TokenType.BYTE)
_PADDED = 1024  # embeddings are rounded up to a multiple of at most this many rows


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Tokens, and how text becomes them. `tokens` has exactly as many entries as the embedding has rows."""

    model: str  # llama.cpp's name of the algorithm: "gpt2" joins by rank of the merge, "llama" by score of the result
    pre: str  # llama.cpp's name for how text is split first
    tokens: list[str]
    types: list[int]
    merges: list[str]  # of "gpt2"
    scores: list[float]  # of "llama"
    bos: int | None
    eos: int | None  # as the tokenizer names it; the chat template may end a turn otherwise
    pad: int | None
    unk: int | None
    add_bos: bool  # whether a text without a chat template begins with bos
    add_space_prefix: bool
    nfc: bool  # whether the tokenizer composes characters first, which llama.cpp leaves to its caller
    # Texts with one of these in it, or with one of these alone, get other ids in llama.cpp, and no GGUF can mend it. In
    # Baichuan 1: a "▁" too many after markup, or before a lone one; in Baichuan 2 at most "▁" itself, typed by a user.
    inexact: tuple[str, ...] = ()
    inexact_alone: tuple[str, ...] = ()

    @cached_property  # asked for once per rendered turn, and a real vocabulary has 150,000 tokens
    def control(self) -> dict[str, int]:
        """Control token texts and their ids."""
        return {t: i for i, (t, kind) in enumerate(zip(self.tokens, self.types, strict=True)) if kind == CONTROL}

    def exact(self, texts: list[str]) -> list[str]:
        """Those of the texts that llama.cpp must tokenise exactly as the original tokenizer does."""
        pieces, alone = self.inexact, set(self.inexact_alone)
        return [text for text in texts if text not in alone and not any(piece in text for piece in pieces)]


def filled(file: Path, by_id: Mapping[int, tuple[str, int]], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types for every row of the embedding; rows without a token get a name nobody writes.

    Raises BadInput for ids beyond the embedding, for far fewer tokens than it has rows, and for a text that occurs
    twice, on which llama.cpp aborts.
    """
    if not by_id or max(by_id) >= rows:
        raise BadInput(
            f"{file} has ids up to {max(by_id, default=-1)}, the embedding has {rows} rows; they differ. Use the "
            "tokenizer that the checkpoint was trained with."
        )
    if (empty := rows - len(by_id)) > max(_PADDED, rows // 20):
        raise BadInput(
            f"{file} has {len(by_id)} tokens, the embedding has {rows} rows; {empty} of them without a token are too "
            "many for padding. Use the tokenizer that the checkpoint was trained with."
        )
    entries = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    twice = [text for text, count in Counter(text for text, _ in entries).items() if count > 1]
    if twice:
        raise BadInput(
            f"{file} holds the same token text under two ids ({twice[0]!r}); llama.cpp would abort on it. Remove one."
        )
    return [text for text, _ in entries], [kind for _, kind in entries]
