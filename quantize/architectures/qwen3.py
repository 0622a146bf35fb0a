"""Qwen3 (dense): RMS-normalised queries and keys, grouped attention, SwiGLU."""

from __future__ import annotations

from typing import Any

from quantize.architectures import TensorPlan, Value, decoder, rotary
from quantize.architectures.settings import count, insist, refuse_windows, sizes, switch

NAME = "qwen3"


def metadata(config: dict[str, Any]) -> dict[str, Value]:
    """Hyper-parameters. Raises BadInput for what llama.cpp would not compute."""
    count(config, "head_dim")  # transformers would take 128 for a missing one, not hidden / heads
    insist(config, "Qwen3", attention_bias=False, hidden_act="silu")
    refuse_windows(config, switch(config, "use_sliding_window"))
    context = count(config, "max_position_embeddings")
    return decoder.metadata(NAME, config, sizes(config), context) | rotary.metadata(
        NAME, config, theta=None, factors=False
    )


def plan(config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor in file order."""
    size = sizes(config)
    queries, keys = size.heads * size.head, size.kv_heads * size.head
    attention = [
        *decoder.linear("attn_q", "self_attn.q_proj", queries, size.hidden),
        *decoder.linear("attn_k", "self_attn.k_proj", keys, size.hidden),
        *decoder.linear("attn_v", "self_attn.v_proj", keys, size.hidden),
        decoder.norm("attn_q_norm", "self_attn.q_norm", size.head),
        decoder.norm("attn_k_norm", "self_attn.k_norm", size.head),
        *decoder.linear("attn_output", "self_attn.o_proj", size.hidden, queries),
    ]
    return decoder.plan(size, attention, tied=switch(config, "tie_word_embeddings"))
