"""Seconds that a stage's step takes on this machine, from a few real steps of its model with random weights."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from trl.trainer.utils import add_fused_lm_head

from trainer.planning.shapes import stage_model
from trainer.planning.tokens import StageTokens
from trainer.recipe import DfpoRecipe, PackedStage, Recipe, StageRecipe

PROBE_SECONDS = 10.0  # over all stages


def tokens_per_second(
    recipe: Recipe, name: str, config: PreTrainedConfig, tokens: StageTokens, device: str, seconds: float
) -> float:
    """Useful tokens (no padding) a second of one process: forward, backward and a share of the optimiser's step.

    The first micro-batch warms up and is not counted; at least one is. The batch has the stage's size and the
    corpus' mean lengths; its tokens are random. Raises torch.OutOfMemoryError on a GPU that is too small.
    """
    try:
        return _measure(recipe, name, config, tokens, device, seconds)
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _measure(
    recipe: Recipe, name: str, config: PreTrainedConfig, tokens: StageTokens, device: str, seconds: float
) -> float:
    stage = recipe.stage(name)
    torch.manual_seed(recipe.seed)
    model, adapted = stage_model(recipe, name, config, device == "cuda", device, attn_implementation=recipe.attention)
    add_fused_lm_head(model.get_base_model() if adapted else model, outputs=("entropy", "is_top1"))
    if stage.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if adapted:
            model.enable_input_require_grads()
    model.train()
    optimizer = _optimizer(stage.optimizer, [p for p in model.parameters() if p.requires_grad])
    batch, useful = _batch(stage, config, tokens, device)
    live = isinstance(stage, DfpoRecipe) and not stage.precompute_reference

    def micro_batch() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
            if live:
                with torch.no_grad():
                    model(**batch, fused_lm_head=True)
            loss = model(**batch, fused_lm_head=True).loss
        loss.backward()

    micro_batch()
    optimizer.step()
    count, elapsed = _timed(micro_batch, device, seconds)
    _, update = _timed(optimizer.step, device, 0.0)
    return useful / (elapsed / count + update / stage.gradient_accumulation)


def _timed(work: Callable[[], Any], device: str, seconds: float) -> tuple[int, float]:
    """How often `work` was done, and in how many seconds: once, then until `seconds` are over."""
    start, count = time.perf_counter(), 0
    while True:
        work()
        count += 1
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return count, elapsed


def _batch(
    stage: StageRecipe, config: PreTrainedConfig, tokens: StageTokens, device: str
) -> tuple[dict[str, Any], int]:
    """A micro-batch of average size, and how many of its tokens are useful."""
    length = max(2, round(tokens.mean))
    if isinstance(stage, PackedStage) and stage.packing:
        pack = stage.batch_size * tokens.tokens / (tokens.packs or 1)
        documents = max(1, round(pack / length))
        ids = torch.randint(config.vocab_size, (1, documents * length), device=device)
        positions = torch.arange(length, device=device).repeat(documents)[None]
        return {"input_ids": ids, "labels": ids, "position_ids": positions}, ids.numel()
    rows = stage.batch_size * (2 if isinstance(stage, DfpoRecipe) else 1)
    padded = max(2, round(length / (1 - tokens.padding)))
    ids = torch.randint(config.vocab_size, (rows, padded), device=device)
    mask = torch.ones_like(ids)
    mask[-1, length:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}, rows * length


def _optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    return (AdamW8bit if name == "adamw_8bit" else PagedAdamW8bit)(parameters)
