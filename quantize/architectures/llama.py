"""Llama 1 to 3 and what is shaped like it: Mistral without a window, Baichuan 7B converted by the trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

from quantize.architectures import TensorPlan, Value, decoder, rotary
from quantize.architectures.settings import count, insist, refuse_windows, sizes, switch

NAME = "llama"


def metadata(config: dict[str, Any]) -> dict[str, Value]:
    """Hyper-parameters. Raises BadInput for what llama.cpp would not compute."""
    insist(config, "Llama", hidden_act="silu")
    refuse_windows(config, True)
    size = sizes(config)
    return (
        decoder.metadata(NAME, config, size, count(config, "max_position_embeddings"))
        | {f"{NAME}.vocab_size": size.vocabulary, f"{NAME}.rope.dimension_count": size.head}
        # Llama 1 and 2 were saved without a base; it was 10000.
        | rotary.metadata(NAME, config, theta=10000.0, factors=True)
    )


def plan(config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor in file order; queries and keys in the row order of ggml's rotation."""
    size = sizes(config)
    queries, keys = size.heads * size.head, size.kv_heads * size.head
    bias = switch(config, "attention_bias")
    turn = partial(rotary.interleaved, head=size.head)
    attention = [
        *decoder.linear("attn_q", "self_attn.q_proj", queries, size.hidden, bias=bias, order=turn(size.heads)),
        *decoder.linear("attn_k", "self_attn.k_proj", keys, size.hidden, bias=bias, order=turn(size.kv_heads)),
        *decoder.linear("attn_v", "self_attn.v_proj", keys, size.hidden, bias=bias),
        *decoder.linear("attn_output", "self_attn.o_proj", size.hidden, queries, bias=bias),
    ]
    return rotary.llama3_factors(config, size.head) + decoder.plan(
        size,
        attention,
        tied=switch(config, "tie_word_embeddings"),
        mlp_bias=switch(config, "mlp_bias"),
    )
