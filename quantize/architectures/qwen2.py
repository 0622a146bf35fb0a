"""Qwen2 and Qwen2.5 (dense): grouped attention with biases on queries, keys and values, SwiGLU."""

from __future__ import annotations

from typing import Any

from quantize.architectures import TensorPlan, Value, decoder, rotary
from quantize.architectures.settings import Sizes, count, insist, refuse_windows, sizes, switch
from quantize.errors import BadInput

NAME = "qwen2"


def metadata(config: dict[str, Any]) -> dict[str, Value]:
    """Hyper-parameters. Raises BadInput for what llama.cpp would not compute."""
    insist(config, "Qwen2", hidden_act="silu")
    refuse_windows(config, switch(config, "use_sliding_window") and _windowed_layers(config))
    context = count(config, "max_position_embeddings")
    return decoder.metadata(NAME, config, _sizes(config), context) | rotary.metadata(
        NAME, config, theta=None, factors=False
    )


def plan(config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor in file order. The biases are in the architecture, not in the config.

    llama.cpp takes them as optional: without them it loads just as well and answers nonsense.
    """
    size = _sizes(config)
    keys = size.kv_heads * size.head
    attention = [
        *decoder.linear("attn_q", "self_attn.q_proj", size.hidden, size.hidden, bias=True),
        *decoder.linear("attn_k", "self_attn.k_proj", keys, size.hidden, bias=True),
        *decoder.linear("attn_v", "self_attn.v_proj", keys, size.hidden, bias=True),
        *decoder.linear("attn_output", "self_attn.o_proj", size.hidden, size.hidden),
    ]
    return decoder.plan(size, attention, tied=switch(config, "tie_word_embeddings"))


def _sizes(config: dict[str, Any]) -> Sizes:
    size = sizes(config)
    if size.heads * size.head != size.hidden:
        raise BadInput(
            f"config.json: {size.heads} heads of size {size.head} do not add up to the hidden size {size.hidden}, "
            "which llama.cpp takes for granted in Qwen2; use another model."
        )
    return size


def _windowed_layers(config: dict[str, Any]) -> bool:
    """Qwen2 slides its window in the layers from `max_window_layers` on."""
    first = config.get("max_window_layers")
    return not isinstance(first, int) or first < count(config, "num_hidden_layers")
