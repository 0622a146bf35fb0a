"""The parameters of a stage's model: counted on the meta device, where a model has shapes but no weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from trainer.bases.baichuan import freeze_head
from trainer.recipe import DenseStage, MueRecipe, Recipe, RecipeError
from trainer.stages.adapters import lora_config
from trainer.stages.psft import mue_config

_LAYER = re.compile(r"\.layers\.(\d+)\.")
# bitsandbytes' NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3): half a byte a weight, one 8-bit
# scale for 64 weights, one float32 scale for 256 of those.
_NF4_BLOCK, _NF4_GROUP = 64, 256


@dataclass(frozen=True)
class Parameter:
    """One tensor of a stage's model. `itemsize` is that of its dtype, `bytes` what it occupies (less in 4-bit)."""

    name: str
    count: int
    itemsize: int
    bytes: int
    trained: bool
    embedding: bool
    head: bool  # the output layer's weight, which may be the embedding's
    linear: bool  # the weight of a linear layer: autocast makes a bfloat16 copy of it
    adapter: bool
    layer: int | None  # number of the decoder layer, None outside of them


def stage_model(
    recipe: Recipe, name: str, config: PreTrainedConfig, gpu: bool = True, device: str = "meta", **options: Any
) -> tuple[Any, bool]:
    """A stage's model with random weights (none on the meta device), and whether it trains an adapter.

    Dtypes are those that `origin.load_model` and PEFT give: trained weights the recipe's, frozen ones bfloat16 on a
    GPU with `bf16`, adapters float32. Raises RecipeError when the model has none of the adapter's target modules.
    """
    stage = recipe.stage(name)
    adapter = mue_config(stage) if isinstance(stage, MueRecipe) else lora_config(cast(DenseStage, stage))
    frozen = adapter is not None and gpu and recipe.bf16
    dtype = torch.bfloat16 if frozen or recipe.dtype == "bfloat16" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        if adapter is None:
            freeze_head(model)
            return model, False
        try:
            return get_peft_model(model, adapter), True
        except ValueError as error:
            raise _no_target(model, recipe, name, error) from None


def stage_parameters(recipe: Recipe, name: str, config: PreTrainedConfig, gpu: bool = True) -> list[Parameter]:
    """The tensors of a stage's model. In a 4-bit stage TRL keeps the adapter in bfloat16."""
    model, adapted = stage_model(recipe, name, config, gpu)
    quantized = recipe.stage(name).load_in_4bit
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    parameters = []
    for key, tensor in model.named_parameters():
        module, count = modules[key.rpartition(".")[0]], tensor.numel()
        adapter = adapted and tensor.requires_grad
        linear = isinstance(module, nn.Linear) and tensor.ndim == 2 and module is not head and not adapter
        itemsize = 2 if adapter and quantized else tensor.itemsize
        layer = _LAYER.search(f".{key}")
        parameters.append(
            Parameter(
                name=key,
                count=count,
                itemsize=itemsize,
                bytes=nf4_bytes(count) if quantized and linear else count * itemsize,
                trained=tensor.requires_grad,
                embedding=isinstance(module, nn.Embedding),
                head=tensor is head.weight,
                linear=linear,
                adapter=adapter,
                layer=int(layer[1]) if layer else None,
            )
        )
    return parameters


def nf4_bytes(count: int) -> int:
    """Bytes of `count` weights in bitsandbytes' NF4 with double quantization (without its two small tables)."""
    scales = math.ceil(count / _NF4_BLOCK)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / _NF4_GROUP)


def _no_target(model: nn.Module, recipe: Recipe, name: str, error: ValueError) -> RecipeError:
    linears = {key.rpartition(".")[2] for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    key = "target_modules" if isinstance(recipe.stage(name), MueRecipe) else "lora_targets"
    return RecipeError(
        f"stages.{name}: the adapter cannot be put on this model ({str(error).rstrip('.')}). Its linear layers are "
        f"{', '.join(sorted(linears - {'lm_head'}))}; name some of them in stages.{name}.{key}."
    )
