"""What to change in a recipe whose stage does not fit, in the order of what it costs: time first, quality last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from trainer.planning.memory import Memory, stage_memory
from trainer.planning.shapes import stage_parameters
from trainer.planning.tokens import StageTokens, largest_batch
from trainer.recipe import STAGES, DenseStage, Recipe

_PROCESSES = (2, 4, 8)


@dataclass(frozen=True)
class Advice:
    """Changed keys of a stage, on top of those before it, and the memory a GPU then needs.

    The last one for a stage can be another launch instead: no changed keys, but more processes.
    """

    stage: str
    changes: dict[str, Any]
    strategy: str
    processes: int
    memory: Memory
    fits: bool

    @property
    def overrides(self) -> list[str]:
        """The changes as KEY=VALUE of the command line."""
        return [_override(self.stage, key, value) for key, value in self.changes.items()]


def advise(
    recipe: Recipe,
    name: str,
    config: PreTrainedConfig,
    tokens: StageTokens,
    strategy: str,
    processes: int,
    capacity: float,
    gpu: bool,
) -> list[Advice]:
    """Steps until the stage `name` fits into `capacity` bytes; last, as another way, FSDP2 on more GPUs."""

    def memory(changed: Recipe, strategy: str, processes: int) -> Memory:
        parameters = stage_parameters(changed, name, config, gpu)
        batch = largest_batch(changed.stage(name), tokens)
        return stage_memory(changed, name, config, parameters, batch, strategy, processes, gpu)

    advice: list[Advice] = []
    changed, dense, least = recipe, recipe, memory(recipe, strategy, processes).total
    for changes in _changes(recipe, name):
        changed = _with(changed, name, changes)
        if not {"method", "load_in_4bit"} & set(changes):
            dense = changed
        need = memory(changed, strategy, processes)
        if need.total < least:
            least = need.total
            if "batch_size" in changes:  # the smallest batch tried stands for the larger ones
                advice.clear()
            advice.append(Advice(name, changes, strategy, processes, need, need.fits(capacity)))
        if need.fits(capacity):
            break
    for count in (count for count in _PROCESSES if gpu and count > processes):
        need = memory(dense, "fsdp2", count)
        if need.fits(capacity):
            return [*advice, Advice(name, {}, "fsdp2", count, need, True)]
    return advice


def together(recipe: Recipe, advice: Sequence[Advice]) -> list[str]:
    """All advised overrides, and what keeps the other stages as they are: a changed key is inherited by the next."""
    changes = {(step.stage, key): value for step in advice for key, value in step.changes.items()}
    pinned = {}
    for stage, key in changes:
        heirs = [name for name in STAGES[STAGES.index(stage) + 1 :] if key in type(recipe.stage(name)).model_fields]
        if heirs and getattr(recipe.stage(heirs[0]), key) == getattr(recipe.stage(stage), key):
            pinned[heirs[0], key] = getattr(recipe.stage(heirs[0]), key)
    every = sorted((pinned | changes).items(), key=lambda item: STAGES.index(item[0][0]))
    return [_override(stage, key, value) for (stage, key), value in every]


def _override(stage: str, key: str, value: object) -> str:
    return f"stages.{stage}.{key}={str(value).lower()}"


def _changes(recipe: Recipe, name: str) -> Iterator[dict[str, Any]]:
    """The knobs of a stage: same result but slower, then a coarser optimiser, then fewer trained weights."""
    stage = recipe.stage(name)
    size, together = stage.batch_size, stage.batch_size * stage.gradient_accumulation
    while size > 1:
        size //= 2
        yield {"batch_size": size, "gradient_accumulation": math.ceil(together / size)}
    if not stage.activation_checkpointing:
        yield {"activation_checkpointing": True}
    full = isinstance(stage, DenseStage) and stage.method == "full"
    if full and stage.optimizer == "adamw":
        yield {"optimizer": "adamw_8bit"}
    if full and recipe.base:
        yield {"method": "lora"}
    if recipe.base and not stage.load_in_4bit:
        yield {"load_in_4bit": True}


def _with(recipe: Recipe, name: str, changes: dict[str, Any]) -> Recipe:
    stage = recipe.stage(name).model_copy(update=changes)
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={name: stage})})
