"""Checkpoints of random weights without a tokenizer, in any small shape: enough for the writer and the quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from quantize import architectures, writer
from quantize.architectures import TensorPlan, source_shapes
from quantize.checkpoint import Tensors
from quantize.sizes import Blueprint

_CLASSES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "baichuan": "BaichuanForCausalLM"}


def blueprint(
    architecture: str = "qwen3",
    *,
    hidden: int = 256,
    layers: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    head: int = 64,
    inner: int = 512,
    vocabulary: int = 300,
    tied: bool = True,
) -> Blueprint:
    """Hyper-parameters and plans as the exporter makes them from a config.json."""
    config: dict[str, Any] = {
        "architectures": [_CLASSES[architecture]],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head,
        "max_position_embeddings": 4096,
        "model_max_length": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "rope_theta": 10000.0,
    }
    module = architectures.for_config(config)
    return Blueprint(module.NAME, module.metadata(config), module.plan(config))


def tensors(model: Blueprint, folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Any]:
    """Writes model.safetensors and returns what is in it."""
    random = torch.Generator().manual_seed(seed)
    values = {
        name: (torch.randn(shape, generator=random) * 0.05).to(dtype)
        for name, shape in source_shapes(model.plans).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values, folder / "model.safetensors")
    return values


def gguf(model: Blueprint, folder: Path, quant: str = "BF16", seed: int = 0) -> Path:
    """A float file of the model, random weights."""
    tensors(model, folder, seed=seed)
    path = folder / f"{quant}.gguf"
    weights = writer.Weights(Tensors([folder / "model.safetensors"]), None)
    writer.write(path, model.architecture, model.metadata, model.plans, weights, quant, lambda *_: None, sync=False)
    return path


def plan_named(model: Blueprint, name: str) -> TensorPlan:
    """The plan of one tensor."""
    return next(plan for plan in model.plans if plan.name == name)
