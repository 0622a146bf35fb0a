"""Numbers and switches of a config.json, checked before anything is computed from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantize.errors import BadInput

_MOST = 2**31 - 1  # GGUF stores sizes as u32, llama.cpp computes with i32
_MOST_LAYERS = 512  # llama.cpp ends the process beyond
_MOST_WIDTH = 1 << 20  # far beyond any model; what is computed per row stays small
_SMALLEST, _LARGEST = 1e-30, 1e30  # GGUF stores numbers as f32


@dataclass(frozen=True)
class Sizes:
    """The sizes every decoder here is described by."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


def sizes(config: dict[str, Any]) -> Sizes:
    """The sizes of a model. Raises BadInput for those that make none."""
    layers, hidden = count(config, "num_hidden_layers"), count(config, "hidden_size")
    heads = count(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else count(config, "num_key_value_heads")
    if layers > _MOST_LAYERS:
        raise BadInput(f"config.json: num_hidden_layers={layers}; llama.cpp runs up to {_MOST_LAYERS}.")
    if config.get("head_dim") is None and hidden % heads:
        raise BadInput(f"config.json: hidden_size {hidden} is no multiple of {heads} heads; save it again.")
    head = hidden // heads if config.get("head_dim") is None else count(config, "head_dim")
    if heads % kv_heads or head % 2 or max(hidden, heads * head) > _MOST_WIDTH:
        raise BadInput(
            f"config.json: {heads} heads of size {head} with {kv_heads} key-value heads and hidden_size {hidden} "
            "make no model; take the config.json that belongs to the weights."
        )
    return Sizes(layers, hidden, count(config, "intermediate_size"), heads, kv_heads, head, count(config, "vocab_size"))


def number(config: dict[str, Any], key: str) -> float:
    """A positive number of the configuration. Raises BadInput when it is missing or something else."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST < value < _LARGEST:
        raise BadInput(f"config.json: `{key}` must be a positive number, found {value!r}; save the checkpoint again.")
    return float(value)


def count(config: dict[str, Any], key: str) -> int:
    """A positive whole number of the configuration. Raises BadInput when it is missing or something else."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
        raise BadInput(
            f"config.json: `{key}` must be a positive whole number, found {value!r}; save the checkpoint again."
        )
    return value


def switch(config: dict[str, Any], key: str) -> bool:
    """A switch of the configuration; one that is missing is off. Raises BadInput for anything but true and false."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadInput(f"config.json: `{key}` must be true or false, found {value!r}; save the checkpoint again.")
    return bool(value)


def insist(config: dict[str, Any], architecture: str, **supported: Any) -> None:
    """Refuses a switch that llama.cpp's graph of this architecture does not have; a missing one has its default."""
    for key, value in supported.items():
        found = value if config.get(key) is None else config[key]
        if found != value:
            raise BadInput(
                f"config.json: {key}={found!r} cannot be exported: llama.cpp computes {architecture} models with "
                f"{value!r} only; use another model."
            )


def refuse_windows(config: dict[str, Any], window_applies: bool) -> None:
    """Refuses a model whose layers see only a window of the text: llama.cpp would show them all of it.

    window_applies: whether `sliding_window` is in force at all (Qwen models carry one that is switched off).
    """
    layers = config.get("layer_types")
    if isinstance(layers, list):
        slides = any(layer != "full_attention" for layer in layers)
    else:
        window = config.get("sliding_window")
        slides = (
            window_applies and isinstance(window, int | float) and window < count(config, "max_position_embeddings")
        )
    if slides:
        raise BadInput(
            "config.json: some layers use sliding-window attention, which llama.cpp does not compute for this "
            "architecture; use a model with full attention."
        )
