"""Checkpoints of every architecture in miniature, and what llama.cpp computes from their GGUF."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from quantize import writer
from quantize.architectures import TensorPlan, for_config
from quantize.checkpoint import Checkpoint
from quantize.probe import Request, probe

Change = Callable[[list[TensorPlan]], Sequence[TensorPlan]]


def save_random(model: Any, folder: Path, seed: int = 0) -> Path:
    """Saves a transformers model whose norms and biases matter as much as its matrices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_((0.5 if name.endswith("bias") else 0.15) * noise)
    model.save_pretrained(folder)
    return folder


def transformers_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of a saved transformers model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def write_gguf(folder: Path, work: Path, quant: str, change: Change = list) -> Path:
    """The GGUF of a checkpoint, without a vocabulary; `change` may spoil the plan."""
    checkpoint = Checkpoint(folder)
    architecture = for_config(checkpoint.config)
    plans = architecture.plan(checkpoint.config)
    checkpoint.check(plans)
    metadata = architecture.metadata(checkpoint.config) | {
        f"{architecture.NAME}.vocab_size": checkpoint.config["vocab_size"],
        "tokenizer.ggml.model": "none",
    }
    file = work / "model.gguf"
    weights = writer.Weights(checkpoint.tensors, None)
    writer.write(file, architecture.NAME, metadata, list(change(plans)), weights, quant, lambda *_: None)
    return file


def llama_cpp_logits(folder: Path, work: Path, ids: list[int], change: Change = list) -> np.ndarray:
    """Logits of a checkpoint's F32 GGUF, through llama.cpp."""
    file = write_gguf(folder, work, "F32", change)
    blocks: list[np.ndarray] = []
    probe(file, Request(sequences=[ids]), work, lambda *_: None, lambda _number, _start, logits: blocks.append(logits))
    return np.concatenate(blocks)


def divergence(reference: np.ndarray, found: np.ndarray) -> float:
    """Largest Kullback-Leibler divergence of a position, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).max())


def make_baichuan(folder: Path, *, layers: int, vocabulary: int, heads: int, **config: Any) -> dict[str, torch.Tensor]:
    """A random checkpoint in Baichuan's own form, hidden size 48; returns its tensors."""
    hidden, inner = 48, 80
    generator = torch.Generator().manual_seed(layers + heads)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        shapes |= {
            f"model.layers.{number}.{name}.weight": shape
            for name, shape in (
                ("self_attn.W_pack", (3 * hidden, hidden)),
                ("self_attn.o_proj", (hidden, hidden)),
                ("mlp.gate_proj", (inner, hidden)),
                ("mlp.up_proj", (inner, hidden)),
                ("mlp.down_proj", (hidden, inner)),
                ("input_layernorm", (hidden,)),
                ("post_attention_layernorm", (hidden,)),
            )
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes.items()
    }
    # Rows of very different lengths, so that dividing by them shows.
    tensors["lm_head.weight"] *= torch.rand(vocabulary, 1, generator=generator) * 4 + 0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["BaichuanForCausalLM"],
                "model_type": "baichuan",
                "hidden_size": hidden,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "vocab_size": vocabulary,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False,
                ("max_position_embeddings" if layers == 32 else "model_max_length"): 256,
                **config,
            }
        )
    )
    return tensors


def baichuan_logits(
    tensors: dict[str, torch.Tensor], ids: list[int], *, heads: int, alibi: bool, norm_head: bool
) -> np.ndarray:
    """The forward pass from the papers' definitions, in float64."""
    weights = {name: tensor.double() for name, tensor in tensors.items()}
    hidden = weights["model.embed_tokens.weight"][ids]
    layers = sum(name.endswith("W_pack.weight") for name in weights)
    for number in range(layers):
        layer = {name.removeprefix(f"model.layers.{number}."): value for name, value in weights.items()}
        normal = _rms(hidden, layer["input_layernorm.weight"])
        packed = normal @ layer["self_attn.W_pack.weight"].T
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in packed.chunk(3, -1))
        if not alibi:
            query, key = _rotate(query), _rotate(key)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        position = torch.arange(len(ids))
        distance = position[:, None] - position[None, :]
        if alibi:
            scores = scores - _slopes(heads)[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(-2)
        hidden = hidden + mixed @ layer["self_attn.o_proj.weight"].T
        normal = _rms(hidden, layer["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(normal @ layer["mlp.gate_proj.weight"].T)
        hidden = hidden + (gate * (normal @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    head = weights["lm_head.weight"]
    if norm_head:
        head = head / head.norm(dim=-1, keepdim=True)
    return (_rms(hidden, weights["model.norm.weight"]) @ head.T).float().numpy()


def _rms(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values * (values.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def _rotate(values: torch.Tensor) -> torch.Tensor:
    """RoFormer's rotation [heads, tokens, size], of dimensions i and i + size/2, base 10000."""
    half = values.shape[-1] // 2
    angles = torch.outer(torch.arange(values.shape[1]).double(), 10000.0 ** (-torch.arange(half).double() / half))
    first, second = values[..., :half], values[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()],
        dim=-1,
    )


def _slopes(heads: int) -> torch.Tensor:
    """ALiBi's slopes: a geometric row for a power of two, filled up from the next power's row otherwise."""
    power = 2 ** int(math.log2(heads))
    row = [2 ** (-8 * (number + 1) / power) for number in range(power)]
    between = [2 ** (-8 * (number + 1) / (2 * power)) for number in range(0, 2 * power, 2)]
    return torch.tensor(row + between[: heads - power], dtype=torch.float64)
