"""Rotary positions as llama.cpp wants to be told about them.

A config.json says it in one of three ways: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`
with the key `rope_type` or, older, `type`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from quantize.architectures import TensorPlan, Value
from quantize.architectures.settings import count, number
from quantize.errors import BadInput


def interleaved(heads: int, head: int) -> np.ndarray:
    """Source rows [heads·head] of a query or key matrix whose graph rotates neighbours (Llama, Baichuan).

    transformers rotates the dimensions (i, i + head/2), ggml's normal mode (2i, 2i + 1): row 2i of a head is its
    row i, row 2i + 1 its row i + head/2.
    """
    return np.arange(heads * head).reshape(heads, 2, head // 2).swapaxes(1, 2).reshape(-1)


def metadata(name: str, config: dict[str, Any], *, theta: float | None, factors: bool) -> dict[str, Value]:
    """The base and, for a model stretched to longer texts, the scaling.

    Parameters:
        theta: the base of a config that names none; None refuses it, for llama.cpp would silently take 10000.
        factors: whether llama.cpp's graph of this architecture reads `rope_freqs.weight`, which llama3 scaling needs.

    Raises BadInput for a scaling that llama.cpp does not compute in this way.
    """
    rope = _settings(config)
    if rope.get("rope_theta") is None:
        if theta is None:
            raise BadInput("config.json lacks `rope_parameters.rope_theta`; save the checkpoint again.")
        rope["rope_theta"] = theta
    values: dict[str, Value] = {f"{name}.rope.freq_base": number(rope, "rope_theta")}
    kind, supported = _kind(rope), ("default", "linear", "yarn", *(("llama3",) if factors else ()))
    if kind not in supported:
        raise BadInput(
            f"config.json: rope_type={kind!r} cannot be exported for {name}; llama.cpp computes {', '.join(supported)}."
        )
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise BadInput("config.json: only a part of each head is rotated, which llama.cpp does not do here.")
    if kind in ("linear", "yarn"):
        values |= {f"{name}.rope.scaling.type": kind, f"{name}.rope.scaling.factor": _factor(rope)}
    if kind == "yarn":
        values |= {f"{name}.rope.scaling.{key}": value for key, value in _yarn(rope).items()}
    return values


def llama3_factors(config: dict[str, Any], head: int) -> list[TensorPlan]:
    """`rope_freqs.weight` [head/2], what each frequency is divided by (Llama 3.1's scaling); nothing without it.

    Long waves are slowed down by `factor`, short ones kept, those between blended, as in transformers'
    modeling_rope_utils and upstream's conversion/llama.py.
    """
    rope = _settings(config)
    if _kind(rope) != "llama3":
        return []
    factor, slow, fast = _factor(rope), number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if fast <= slow:
        raise BadInput(f"config.json: high_freq_factor {fast} must exceed low_freq_factor {slow}; save it again.")
    base = number({"rope_theta": 10000.0} | rope, "rope_theta")
    waves = 2 * math.pi * base ** (np.arange(0, head, 2) / head)
    # The share of the unscaled frequency: 0 for waves beyond context / slow, 1 for those below context / fast.
    share = np.clip((count(rope, "original_max_position_embeddings") / waves - slow) / (fast - slow), 0, 1)
    values = (1 / ((1 - share) / factor + share)).astype(np.float32)
    return [TensorPlan("rope_freqs.weight", "", values.shape, values=values)]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise BadInput(f"config.json: `{key}` must be an object, found {found!r}; save the checkpoint again.")
        rope |= found
    return rope


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _factor(rope: dict[str, Any]) -> float:
    factor = number(rope, "factor")
    if factor < 1:
        raise BadInput(f"config.json: the rope factor {factor} would shorten the context; save the checkpoint again.")
    return factor


def _yarn(rope: dict[str, Any]) -> dict[str, Value]:
    factor = _factor(rope)
    values: dict[str, Value] = {"original_context_length": count(rope, "original_max_position_embeddings")}
    for key, fixed in (("truncate", True), ("beta_fast", 32), ("beta_slow", 1)):
        if rope.get(key) not in (None, fixed):
            # llama.cpp has keys for the betas, but reads them for other architectures only.
            raise BadInput(f"config.json: yarn with {key}={rope[key]!r} cannot be exported; llama.cpp takes {fixed!r}.")
    # transformers scales cos and sin by this; llama.cpp by attn_factor · (0.1·ln(factor) + 1).
    usual = _magnitude(factor, 1.0)
    if rope.get("attention_factor") is not None:
        values["attn_factor"] = number(rope, "attention_factor") / usual
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        scales = [_magnitude(factor, number(rope, key)) for key in ("mscale", "mscale_all_dim")]
        values["attn_factor"] = scales[0] / scales[1] / usual
    return values


def _magnitude(factor: float, scale: float) -> float:
    """YaRN's attention factor (section 3.4 of the paper)."""
    return 0.1 * scale * math.log(factor) + 1
