"""The plan of a run, made before it: parameters, tokens, steps, memory, disk and, from a probe, time.

No weights are loaded. What each figure is made of stands in trainer/planning.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from trainer.origin import model_config
from trainer.planning.activations import mask_bytes
from trainer.planning.advice import Advice, advise, together
from trainer.planning.disk import Disk, disk
from trainer.planning.flops import flops_per_token, peak_flops
from trainer.planning.memory import Memory, stage_memory, training_of
from trainer.planning.prepare import load_tokenizer
from trainer.planning.probe import PROBE_SECONDS, tokens_per_second
from trainer.planning.shapes import Parameter, stage_parameters
from trainer.planning.tokens import StageTokens, count_tokens, largest_batch
from trainer.recipe import STAGES, DenseStage, DfpoRecipe, Recipe
from trainer.stages.build import stage_records
from trainer.stages.template import check_template

GIB = 2**30
DEFAULT_GPU = 24  # GiB


@dataclass(frozen=True)
class Device:
    """What the memory is held against."""

    name: str
    bytes: float
    gpu: bool


@dataclass(frozen=True)
class Speed:
    """From the probe: one process' useful tokens a second, the stage's hours on all of them, MFU if known."""

    device: str
    tokens_per_second: float
    hours: float
    mfu: float | None


@dataclass(frozen=True)
class StagePlan:
    """One stage. `memory` is the largest micro-batch's, by strategy; `not_probed` says why there is no speed."""

    method: str  # full, lora or mue
    four_bit: bool
    parameters: int
    trainable: int
    tokens: StageTokens
    memory: dict[str, Memory]
    mask: int  # bytes of attention masks among the activations
    flops_per_token: float
    speed: Speed | None = None
    not_probed: str | None = None


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    recipe: str
    parameters: int
    embeddings: int
    processes: int
    device: Device
    stages: dict[str, StagePlan]
    disk: Disk
    disk_free: int
    advice: list[Advice]
    overrides: list[str]  # all of the advice for the command line, if it makes every stage fit

    @property
    def disk_bytes(self) -> int:
        """What the run folder needs at its fullest."""
        return self.disk.total

    @property
    def fitting(self) -> list[str]:
        """Strategies under which every stage fits."""
        plans = list(self.stages.values())
        return [name for name in plans[0].memory if all(p.memory[name].fits(self.device.bytes) for p in plans)]

    @property
    def fits(self) -> bool:
        """Whether the run can be made: a strategy fits, and the disk is large enough."""
        return bool(self.fitting) and self.disk_bytes <= self.disk_free

    def fits_in(self, memory: Memory) -> bool:
        """Whether a stage's memory fits into the device."""
        return memory.fits(self.device.bytes)


def plan(
    recipe: Recipe,
    corpus: Path,
    processes: int = 1,
    gpu_memory: float | None = None,
    probe: bool | None = None,
    progress: Callable[[str], Any] = lambda text: None,
) -> Plan:
    """Plans a recipe over its finished corpus folder.

    `gpu_memory` in GiB replaces the GPU that is here (24 when there is none). `probe` trains random weights for ten
    seconds (None: if the device is here and a GPU). Raises RecipeError or CorpusError for what would stop the run.
    """
    device = find_device(recipe, gpu_memory)
    if probe is None:
        probe = device.gpu and gpu_memory is None and torch.cuda.is_available()
    tokenizer = load_tokenizer(recipe, corpus)
    check_template(tokenizer)
    config = model_config(recipe, len(tokenizer))
    parameters = {name: stage_parameters(recipe, name, config, device.gpu) for name in STAGES}
    stages = {}
    for name in STAGES:
        progress(f"{name}: counting tokens")
        tokens = count_tokens(recipe, name, stage_records(name, corpus), tokenizer, processes)
        stages[name] = _stage_plan(recipe, name, config, parameters[name], tokens, device, processes)
        if probe:
            progress(f"{name}: probing")
            stages[name] = _probed(recipe, name, config, stages[name], processes)
    base = [p for p in parameters[STAGES[0]] if not p.adapter]
    unfit, advice = _advice(recipe, config, stages, device, processes)
    solved = {step.stage for step in advice if step.changes and step.fits}
    return Plan(
        recipe=recipe.name,
        parameters=sum(p.count for p in base),
        embeddings=sum(p.count for p in base if p.embedding or p.head),
        processes=processes,
        device=device,
        stages=stages,
        disk=disk(recipe, parameters),
        disk_free=shutil.disk_usage(Path.cwd()).free,
        advice=advice,
        overrides=together(recipe, advice) if solved.issuperset(unfit) else [],
    )


def find_device(recipe: Recipe, gpu_memory: float | None) -> Device:
    """The device the run is planned for: the RAM here for `device: cpu`, else a GPU, given, present or assumed."""
    if recipe.device == "cpu":
        return Device("this machine's RAM", psutil.virtual_memory().total, gpu=False)
    if gpu_memory is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, gpu=True)
    size = gpu_memory or DEFAULT_GPU
    return Device("a GPU", size * GIB, gpu=True)


def _stage_plan(
    recipe: Recipe,
    name: str,
    config: PreTrainedConfig,
    parameters: Sequence[Parameter],
    tokens: StageTokens,
    device: Device,
    processes: int,
) -> StagePlan:
    stage = recipe.stage(name)
    total, trainable = sum(p.count for p in parameters), sum(p.count for p in parameters if p.trained)
    batch = largest_batch(stage, tokens)
    training = training_of(recipe, name, parameters)
    return StagePlan(
        method=stage.method if isinstance(stage, DenseStage) else "mue",
        four_bit=stage.load_in_4bit,
        parameters=total,
        trainable=trainable,
        tokens=tokens,
        memory={
            strategy: stage_memory(recipe, name, config, parameters, batch, strategy, processes, device.gpu)
            for strategy in _strategies(device, processes)
        },
        mask=mask_bytes(config, batch, training, stage.activation_checkpointing),
        flops_per_token=flops_per_token(config, trainable, total, tokens.mean),
    )


def _strategies(device: Device, processes: int) -> tuple[str, ...]:
    if processes == 1:
        return ("single",)
    return ("ddp", "fsdp2", "zero3") if device.gpu else ("ddp",)


def _advice(
    recipe: Recipe, config: PreTrainedConfig, stages: Mapping[str, StagePlan], device: Device, processes: int
) -> tuple[list[str], list[Advice]]:
    """The stages that do not fit under the strategy in which most do, and advice for them."""
    unfit = {
        strategy: [name for name, stage in stages.items() if not stage.memory[strategy].fits(device.bytes)]
        for strategy in _strategies(device, processes)
    }
    strategy = min(unfit, key=lambda strategy: len(unfit[strategy]))
    advice = [
        step
        for name in unfit[strategy]
        for step in advise(recipe, name, config, stages[name].tokens, strategy, processes, device.bytes, device.gpu)
    ]
    return unfit[strategy], advice


def _probed(recipe: Recipe, name: str, config: PreTrainedConfig, plan: StagePlan, processes: int) -> StagePlan:
    """The stage with its speed here, or the reason why there is none."""
    gpu = recipe.device != "cpu" and torch.cuda.is_available()
    here = torch.cuda.get_device_properties(0).total_memory if gpu else psutil.virtual_memory().available
    if plan.four_bit:
        return replace(plan, not_probed="a probe would need 4-bit weights")
    need = next(iter(plan.memory.values()))
    if not need.fits(here):
        return replace(plan, not_probed="it does not fit into this machine")
    device, share = "cuda" if gpu else "cpu", PROBE_SECONDS / len(STAGES)
    try:
        rate = tokens_per_second(recipe, name, config, plan.tokens, device, share)
    except (ImportError, torch.OutOfMemoryError) as error:
        return replace(plan, not_probed=str(error).splitlines()[0])
    where = torch.cuda.get_device_name() if gpu else "this machine's processor"
    peak = peak_flops(where) if gpu else 0.0
    seconds = _trained_tokens(recipe, name, plan.tokens, processes) / (rate * processes)
    return replace(
        plan,
        speed=Speed(where, rate, seconds / 3600, rate * plan.flops_per_token / peak if peak else None),
    )


def _trained_tokens(recipe: Recipe, name: str, tokens: StageTokens, processes: int) -> float:
    """Tokens of all steps; those of the precomputed reference count a third, a step has about three forward passes."""
    stage = recipe.stage(name)
    units = tokens.packs or tokens.rows
    epochs = stage.epochs
    if stage.max_steps:
        epochs = stage.max_steps * stage.batch_size * stage.gradient_accumulation * processes / units
    reference = 1 / 3 if isinstance(stage, DfpoRecipe) and stage.precompute_reference else 0
    return tokens.tokens * (epochs + reference)
