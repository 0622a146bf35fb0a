"""What all decoders here share: RMS norms before attention and before a SwiGLU, one embedding, one head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quantize.architectures import TensorPlan, Value
from quantize.architectures.settings import Sizes, number


def metadata(name: str, config: dict[str, Any], size: Sizes, context: int) -> dict[str, Value]:
    """Hyper-parameters; the head size is written out because llama.cpp otherwise assumes hidden / heads."""
    return {
        f"{name}.block_count": size.layers,
        f"{name}.context_length": context,
        f"{name}.embedding_length": size.hidden,
        f"{name}.feed_forward_length": size.inner,
        f"{name}.attention.head_count": size.heads,
        f"{name}.attention.head_count_kv": size.kv_heads,
        f"{name}.attention.key_length": size.head,
        f"{name}.attention.value_length": size.head,
        f"{name}.attention.layer_norm_rms_epsilon": number(config, "rms_norm_eps"),
    }


def linear(
    name: str, source: str, rows: int, columns: int, *, bias: bool = False, order: np.ndarray | None = None
) -> list[TensorPlan]:
    """A layer's matrix [rows, columns] and its bias [rows]."""
    plans = [TensorPlan(f"{name}.weight", f"{source}.weight", (rows, columns), order)]
    return plans + ([TensorPlan(f"{name}.bias", f"{source}.bias", (rows,), order)] if bias else [])


def norm(name: str, source: str, length: int) -> TensorPlan:
    """An RMS norm's weight [length]."""
    return TensorPlan(f"{name}.weight", f"{source}.weight", (length,))


def feed_forward(size: Sizes, *, bias: bool = False) -> list[TensorPlan]:
    """The SwiGLU of a layer, named relative to it."""
    return [
        *linear("ffn_gate", "mlp.gate_proj", size.inner, size.hidden, bias=bias),
        *linear("ffn_up", "mlp.up_proj", size.inner, size.hidden, bias=bias),
        *linear("ffn_down", "mlp.down_proj", size.hidden, size.inner, bias=bias),
    ]


def plan(
    size: Sizes,
    attention: Sequence[TensorPlan],
    *,
    tied: bool,
    mlp_bias: bool = False,
    unit_head: bool = False,
) -> list[TensorPlan]:
    """Every tensor in file order; `attention` holds the tensors of one layer, named relative to it.

    With tied embeddings llama.cpp takes token_embd for the output.
    """
    vocabulary = (size.vocabulary, size.hidden)
    plans = [TensorPlan("token_embd.weight", "model.embed_tokens.weight", vocabulary)]
    if not tied:
        plans.append(TensorPlan("output.weight", "lm_head.weight", vocabulary, unit_rows=unit_head))
    parts = [
        norm("attn_norm", "input_layernorm", size.hidden),
        *attention,
        norm("ffn_norm", "post_attention_layernorm", size.hidden),
        *feed_forward(size, bias=mlp_bias),
    ]
    plans += [
        TensorPlan(f"blk.{layer}.{part.name}", f"model.layers.{layer}.{part.source}", part.shape, part.order)
        for layer in range(size.layers)
        for part in parts
    ]
    return [*plans, norm("output_norm", "model.norm", size.hidden)]
