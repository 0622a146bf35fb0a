"""What a GGUF says of its vocabulary, for files of which nobody has the source."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import TokenType

from quantize.header import Header


@dataclass(frozen=True)
class OwnWords:
    """The vocabulary that a file carries."""

    tokens: list[str]
    control: dict[str, int]
    eos: int
    chat_template: str
    nfc: bool = False

    @classmethod
    def of(cls, head: Header) -> OwnWords:
        """From the header of a usable file."""
        values = head.metadata
        tokens, kinds = values["tokenizer.ggml.tokens"].list(), values["tokenizer.ggml.token_type"].list()
        control = {tokens[number]: number for number, kind in enumerate(kinds) if kind == TokenType.CONTROL}
        return cls(tokens, control, values["tokenizer.ggml.eos_token_id"], values.get("tokenizer.chat_template", ""))

    def exact(self, texts: list[str]) -> list[str]:
        """All texts: a file is only held against itself."""
        return texts
