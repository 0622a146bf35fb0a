"""Room on the disk: what the stages hand on, and the checkpoints of the stage that has the largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from trainer.origin import model_config
from trainer.planning.memory import optimizer_bytes
from trainer.planning.shapes import Parameter, stage_parameters
from trainer.recipe import STAGES, DenseStage, Recipe
from trainer.stages.checkpoints import KEPT


@dataclass(frozen=True)
class Disk:
    """Bytes that a run needs at its fullest."""

    stages: dict[str, int]  # the folder of each stage
    checkpoints: int  # while the stage with the largest ones runs

    @property
    def total(self) -> int:
        return sum(self.stages.values()) + self.checkpoints


def disk(recipe: Recipe, parameters: Mapping[str, Sequence[Parameter]] | None = None) -> Disk:
    """Disk of a run. `parameters` of each stage are counted if they are not given, in about a second.

    A dense folder is in the dtype it was trained in; a merged LoRA keeps the dtype of what it is merged into. A
    checkpoint holds what trains and the optimiser's state; the newest two are kept (and the best), one more is
    written beside them.
    """
    config = model_config(recipe)
    parameters = parameters or {name: stage_parameters(recipe, name, config) for name in STAGES}
    folders, checkpoints = {}, []
    stored = _itemsize(config) if recipe.base else 4
    for name in STAGES:
        stage = recipe.stage(name)
        trained = [p for p in parameters[name] if p.trained]
        adapter = any(p.adapter for p in trained)
        weights = sum(p.count * p.itemsize for p in (trained if adapter else parameters[name]))
        optimizer = stage.optimizer.removeprefix("paged_")  # on the disk paged states are states like others
        states = sum(optimizer_bytes(p, optimizer) for p in trained)
        checkpoints.append((weights + states) * (KEPT + 1 + (stage.keep == "best")))
        if isinstance(stage, DenseStage):
            stored = stored if adapter else trained[0].itemsize
            folders[name] = sum(p.count for p in parameters[name] if not p.adapter) * stored
        else:
            folders[name] = weights
    return Disk(folders, max(checkpoints))


def _itemsize(config: PreTrainedConfig) -> int:
    """Bytes of a number in a base's files."""
    return (config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16).itemsize
