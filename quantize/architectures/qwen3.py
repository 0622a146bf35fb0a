"""Qwen3 (dense): RMS-normalised queries and keys, grouped attention, SwiGLU."""

from __future__ import annotations

from typing import Any

from quantize.architectures import TensorPlan, Value, required
from quantize.errors import BadInput

NAME = "qwen3"


def metadata(config: dict[str, Any]) -> dict[str, Value]:
    """Hyper-parameters; head_dim is written out because llama.cpp otherwise assumes hidden / heads."""
    _refuse_unsupported(config)
    return {
        "qwen3.block_count": int(required(config, "num_hidden_layers")),
        "qwen3.context_length": int(required(config, "max_position_embeddings")),
        "qwen3.embedding_length": int(required(config, "hidden_size")),
        "qwen3.feed_forward_length": int(required(config, "intermediate_size")),
        "qwen3.attention.head_count": int(required(config, "num_attention_heads")),
        "qwen3.attention.head_count_kv": int(required(config, "num_key_value_heads")),
        "qwen3.attention.key_length": int(required(config, "head_dim")),
        "qwen3.attention.value_length": int(required(config, "head_dim")),
        "qwen3.attention.layer_norm_rms_epsilon": float(required(config, "rms_norm_eps")),
        "qwen3.rope.freq_base": _rope_theta(config),
    }


def plan(config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor in file order; with tied embeddings llama.cpp takes token_embd for the output."""
    hidden, inner = required(config, "hidden_size"), required(config, "intermediate_size")
    head = required(config, "head_dim")
    queries, keys = (
        required(config, "num_attention_heads") * head,
        required(config, "num_key_value_heads") * head,
    )
    vocabulary = required(config, "vocab_size")
    plans = [TensorPlan("token_embd.weight", "model.embed_tokens.weight", (vocabulary, hidden))]
    if not config.get("tie_word_embeddings", False):
        plans.append(TensorPlan("output.weight", "lm_head.weight", (vocabulary, hidden)))
    layer = (
        ("attn_norm", "input_layernorm", (hidden,)),
        ("attn_q", "self_attn.q_proj", (queries, hidden)),
        ("attn_k", "self_attn.k_proj", (keys, hidden)),
        ("attn_v", "self_attn.v_proj", (keys, hidden)),
        ("attn_q_norm", "self_attn.q_norm", (head,)),
        ("attn_k_norm", "self_attn.k_norm", (head,)),
        ("attn_output", "self_attn.o_proj", (hidden, queries)),
        ("ffn_norm", "post_attention_layernorm", (hidden,)),
        ("ffn_gate", "mlp.gate_proj", (inner, hidden)),
        ("ffn_up", "mlp.up_proj", (inner, hidden)),
        ("ffn_down", "mlp.down_proj", (hidden, inner)),
    )
    for number in range(required(config, "num_hidden_layers")):
        plans += [
            TensorPlan(f"blk.{number}.{name}.weight", f"model.layers.{number}.{source}.weight", shape)
            for name, source, shape in layer
        ]
    plans.append(TensorPlan("output_norm.weight", "model.norm.weight", (hidden,)))
    return plans


def _rope_theta(config: dict[str, Any]) -> float:
    # transformers 5 moved rope_theta into rope_parameters; llama.cpp would silently take 10000 for a missing one.
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise BadInput("config.json lacks `rope_parameters.rope_theta`; save the checkpoint again.")
    return float(theta)


def _refuse_unsupported(config: dict[str, Any]) -> None:
    rope = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    for key, found, supported in (
        ("rope_type", rope, "default"),
        ("attention_bias", bool(config.get("attention_bias", False)), False),
        ("use_sliding_window", bool(config.get("use_sliding_window", False)), False),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
    ):
        if found != supported:
            raise BadInput(f"config.json: {key}={found!r} cannot be exported for Qwen3; only {supported!r} can.")
