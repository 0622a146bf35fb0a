"""A small SentencePiece vocabulary like Baichuan2's."""

from __future__ import annotations

import io
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from quantize.strings import medical_strings

_pb2: Any = sentencepiece_model_pb2
CUT_OUT = ["\n", "，", "0", "1", "```", "▁▁", "▁▁▁▁", *(f"<reserved_{number}>" for number in range(104, 110))]


def train(size: int = 1000) -> bytes:
    """The content of a tokenizer.model without dummy prefix; pieces beyond 1,000 are ones that no text needs."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(medical_strings()),
        model_writer=written,
        model_type="bpe",
        vocab_size=1000,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=CUT_OUT,
        num_threads=1,
        minloglevel=2,
    )
    proto = _pb2.ModelProto.FromString(written.getvalue())
    for number in range(len(proto.pieces), size):
        proto.pieces.add(piece=f"never{number}met", score=-1e6 - number)
    return proto.SerializeToString()
