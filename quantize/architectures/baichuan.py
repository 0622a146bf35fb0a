"""Baichuan 7B and 13B, Baichuan2 7B and 13B in their own form: one matrix W_pack, rotary positions or ALiBi.

The config.json says neither which positions a model uses nor how its head works. Positions: 32 layers rotate (7B),
40 layers have ALiBi (13B), and llama.cpp decides by exactly that. Head: Baichuan2 divides every row of `lm_head` by
its length (NormHead), which llama.cpp does not do, so the rows are stored divided.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantize.architectures import TensorPlan, Value, decoder, rotary
from quantize.architectures.settings import Sizes, count, insist, sizes
from quantize.errors import BadInput

NAME = "baichuan"
_ROTARY_LAYERS, _ALIBI_LAYERS = 32, 40
_NORM_HEAD = {64000: False, 125696: True}  # by vocabulary: Baichuan 1, Baichuan 2


def metadata(config: dict[str, Any]) -> dict[str, Value]:
    """Hyper-parameters. Raises BadInput for what llama.cpp would not compute."""
    insist(config, "Baichuan", hidden_act="silu", tie_word_embeddings=False)
    size = _sizes(config)
    # A 13B has no max_position_embeddings: ALiBi needs no table.
    context = count(config, "model_max_length" if _alibi(size) else "max_position_embeddings")
    return decoder.metadata(NAME, config, size, context) | {
        f"{NAME}.rope.dimension_count": size.head,
        f"{NAME}.rope.freq_base": 10000.0,  # stands in upstream's code, not in its config.json
        f"{NAME}.tensor_data_layout": "Meta AI original pth",
    }


def plan(config: dict[str, Any]) -> list[TensorPlan]:
    """Every tensor in file order; queries, keys and values are the three thirds of W_pack [3·hidden, hidden]."""
    size = _sizes(config)
    # Without a rotation the order inside a head is free, as long as queries and keys share it.
    third = np.arange(size.hidden) if _alibi(size) else rotary.interleaved(size.heads, size.head)
    values = np.arange(2 * size.hidden, 3 * size.hidden)
    attention = [
        *_third("attn_q", size, third),
        *_third("attn_k", size, third + size.hidden),
        *_third("attn_v", size, values),
        *decoder.linear("attn_output", "self_attn.o_proj", size.hidden, size.hidden),
    ]
    return decoder.plan(size, attention, tied=False, unit_head=_norm_head(config))


def _third(name: str, size: Sizes, order: np.ndarray) -> list[TensorPlan]:
    return decoder.linear(name, "self_attn.W_pack", size.hidden, size.hidden, order=order)


def _sizes(config: dict[str, Any]) -> Sizes:
    # Its config class has neither key-value heads nor a head size of its own.
    own = {key: value for key, value in config.items() if key not in ("num_key_value_heads", "head_dim")}
    size = sizes(own)
    if size.layers not in (_ROTARY_LAYERS, _ALIBI_LAYERS):
        raise BadInput(
            f"config.json: a Baichuan model with {size.layers} layers cannot be exported: llama.cpp rotates with "
            f"{_ROTARY_LAYERS}, uses ALiBi with {_ALIBI_LAYERS} and no positions at all otherwise; use a 7B or a 13B."
        )
    stated, used = str(config.get("position_embedding") or "").upper(), "ALIBI" if _alibi(size) else "ROPE"
    if stated not in ("", used):
        raise BadInput(
            f"config.json: position_embedding={stated!r}, but llama.cpp computes {used} for a Baichuan with "
            f"{size.layers} layers; use a 7B with rotary positions or a 13B with ALiBi."
        )
    return size


def _alibi(size: Sizes) -> bool:
    return size.layers == _ALIBI_LAYERS


def _norm_head(config: dict[str, Any]) -> bool:
    """Baichuan 2 or 1? By the vocabulary; after a change of it by a key only Baichuan2's own class writes."""
    known = _NORM_HEAD.get(count(config, "vocab_size"))
    if known is None and "z_loss_weight" not in config:
        raise BadInput(
            f"config.json: vocab_size {config['vocab_size']} is neither Baichuan 1 (64000, plain head) nor Baichuan 2 "
            '(125696, normalised head); if the model was made from Baichuan 2, add "z_loss_weight": 0 to the file.'
        )
    return True if known is None else known
