"""Memory of one GPU while a stage trains: what is there all the time, and the largest of three moments of a step.

Single GPU and DDP are held against real steps (tests/trainer/test_plan.py); FSDP2 and ZeRO-3 are arithmetic over
what accelerate and DeepSpeed document. Not counted: NCCL's buffers and what the allocator loses to fragmentation,
for which `Memory.fits` leaves 5 % free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from trainer.planning.activations import Batch, Training, all_targets, saved, saved_by_layer
from trainer.planning.shapes import Parameter
from trainer.recipe import DenseStage, DfpoRecipe, MueRecipe, Recipe, StageRecipe

STRATEGIES = ("single", "ddp", "fsdp2", "zero3")
CONTEXT = 600_000_000  # CUDA context, cuBLAS and cuDNN workspaces; on the processor the interpreter with torch
_USABLE = 0.95
# TRL's fused output layer works on tiles of this many tokens and vocabulary entries (trl/kernels/chunked_logprob.py).
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768
# DeepSpeed's default stage3_max_live_parameters: so many gathered parameters stay until others need their room.
_ZERO3_LIVE = 1_000_000_000
# bitsandbytes: states in 8 bits with a float32 scale for 256 of them; small tensors keep float32 states.
_BLOCK, _SMALLEST_8BIT = 256, 4096


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step, by what they are for."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` counts: all but the context."""
        return self.total - self.parts["context"]

    def fits(self, capacity: float) -> bool:
        """Whether it fits into `capacity` bytes with 5 % to spare."""
        return self.total <= _USABLE * capacity


def optimizer_bytes(parameter: Parameter, optimizer: str, itemsize: int | None = None) -> int:
    """State of one trained tensor.

    AdamW: two moments in the parameter's dtype and a step counter. In 8 bits: two bytes and two scales for 256
    values, except for tensors below 4096 values and embeddings, whose states transformers keeps in float32. Paged
    states live in host memory when the GPU is full, so they ask nothing of it.
    """
    count = parameter.count
    if optimizer == "adamw":
        return 2 * count * (itemsize or parameter.itemsize) + 4
    if optimizer == "paged_adamw_8bit":
        return 0
    if parameter.embedding or count < _SMALLEST_8BIT:
        return 8 * count
    return 2 * (count + 4 * math.ceil(count / _BLOCK))


def training_of(recipe: Recipe, name: str, parameters: Sequence[Parameter]) -> Training:
    """What of a stage decides about its activations."""
    stage = recipe.stage(name)
    stream = 4 if all(p.itemsize == 4 for p in parameters if not p.adapter) else 2
    experts, rank, targets = None, 0, frozenset()
    if isinstance(stage, MueRecipe):
        experts, targets = (1 + stage.num_specific, stage.r), all_targets(stage.target_modules)
    elif isinstance(stage, DenseStage) and stage.method == "lora":
        rank, targets = stage.lora_r, frozenset(stage.lora_targets)
    return Training(
        compute=2 if recipe.bf16 else stream,
        stream=stream,
        targets=targets,
        rank=rank,
        experts=experts,
        cast_inputs=bool(rank) and recipe.bf16 and not stage.load_in_4bit,
        attention=recipe.attention,
        head_norms=any(".q_norm." in p.name for p in parameters),
    )


def stage_memory(
    recipe: Recipe,
    name: str,
    config: PreTrainedConfig,
    parameters: Sequence[Parameter],
    batch: Batch,
    strategy: str = "single",
    processes: int = 1,
    gpu: bool = True,
) -> Memory:
    """Peak memory of a stage on one of `processes` GPUs under a strategy of STRATEGIES."""
    stage, training = recipe.stage(name), training_of(recipe, name, parameters)
    standing, gradients = _standing(recipe, stage, parameters, strategy, processes)
    kept = saved(config, batch, training, stage.activation_checkpointing)
    again = 0
    if stage.activation_checkpointing:  # float32 inputs are kept already
        shared = config.hidden_size * batch.tokens * 4 if training.stream == 4 else 0
        again = saved_by_layer(config, batch, training) - shared
    copies, copies_again = _autocast_copies(recipe, stage, parameters) if strategy in ("single", "ddp") else (0, 0)
    head = sum(p.count for p in parameters if p.head and p.trained)
    # Between the micro-batches of a step gradients stay; else they grow while activations go, the head's first.
    carried = gradients if stage.gradient_accumulation > 1 else 0
    # A tied embedding gets its second gradient last; it is added to the head's.
    second = 4 * head if config.tie_word_embeddings else 0
    moments = {
        "loss": (carried, copies, kept, _loss(config, batch, training, head, gpu)),
        "backward": (max(carried, 4 * head), copies_again, kept + again + _passing(config, batch, training), 0),
        "update": (gradients + second, 0, 0, 0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    parts = dict(zip(("gradients", "copies", "activations", "loss"), moments[moment], strict=True))
    return Memory(moment, {**standing, **parts, "context": CONTEXT})


def _standing(
    recipe: Recipe, stage: StageRecipe, parameters: Sequence[Parameter], strategy: str, processes: int
) -> tuple[dict[str, int], int]:
    """What is there all the time, and the bytes of all gradients."""
    trained = [p for p in parameters if p.trained]
    weights = sum(p.bytes for p in parameters)
    gradients = sum(p.count * p.itemsize for p in trained)
    optimizer = sum(optimizer_bytes(p, stage.optimizer) for p in trained)
    gathered = 0
    if strategy == "ddp":
        gathered = gradients  # the reducer's buckets: transformers does not let gradients be views of them
    elif strategy == "fsdp2":
        weights, gradients, optimizer, gathered = _fsdp2(recipe, stage, parameters, processes)
    elif strategy == "zero3":
        weights, gradients, optimizer, gathered = _zero3(recipe, stage, parameters, processes)
    # Without precomputed log-probabilities full DFPO holds a second copy of the model.
    live = isinstance(stage, DfpoRecipe) and stage.method == "full" and not stage.precompute_reference
    standing = {"weights": weights, "optimizer": optimizer, "gathered": gathered, "reference": weights if live else 0}
    return standing, gradients


def _fsdp2(
    recipe: Recipe, stage: StageRecipe, parameters: Sequence[Parameter], processes: int
) -> tuple[int, int, int, int]:
    """accelerate's fully_shard, a group for each layer and one for the rest, which stays gathered.

    Under mixed precision trained weights are sharded in float32 and gathered in bfloat16; of the layers the one at
    work and the next one are gathered, and the gradients of as many wait to be reduced.
    """
    trained = [p for p in parameters if p.trained]
    mixed = recipe.bf16 and not stage.load_in_4bit
    itemsize = {p.name: 4 if mixed and p.trained else p.itemsize for p in parameters}
    sharded = sum(p.count * 4 if mixed and p.trained else p.bytes for p in parameters)
    gradients = sum(p.count * itemsize[p.name] for p in trained)
    optimizer = sum(optimizer_bytes(p, stage.optimizer, itemsize[p.name]) for p in trained)

    def gathered(group: list[Parameter]) -> int:
        whole = sum(p.count * 2 if mixed else p.bytes for p in group)
        return whole + sum(p.count * (2 if mixed else p.itemsize) for p in group if p.trained)

    layer = [p for p in parameters if p.layer == 0]
    rest = [p for p in parameters if p.layer is None]
    return sharded // processes, gradients // processes, optimizer // processes, 2 * gathered(layer) + gathered(rest)


def _zero3(
    recipe: Recipe, stage: StageRecipe, parameters: Sequence[Parameter], processes: int
) -> tuple[int, int, int, int]:
    """DeepSpeed's stage 3: weights and gradients in bfloat16, float32 master weights beside the optimizer's moments.

    Up to stage3_max_live_parameters gathered weights stay.
    """
    trained = [p for p in parameters if p.trained]
    itemsize = 2 if recipe.bf16 else 4
    weights = sum(p.count * itemsize if p.trained else p.bytes for p in parameters)
    gradients = itemsize * sum(p.count for p in trained)
    master = 4 * sum(p.count for p in trained) if recipe.bf16 else 0
    optimizer = sum(optimizer_bytes(p, stage.optimizer, 4) for p in trained) + master
    gathered = itemsize * min(sum(p.count for p in parameters), _ZERO3_LIVE)
    return weights // processes, gradients // processes, optimizer // processes, gathered


def _autocast_copies(recipe: Recipe, stage: StageRecipe, parameters: Sequence[Parameter]) -> tuple[int, int]:
    """bfloat16 copies that autocast makes of float32 weights of linear layers: in the forward and backward pass.

    It keeps those of trained weights to the end of the forward pass, the graph keeps all of them for the backward
    pass; with activation checkpointing the backward pass makes them again, one layer at a time.
    """
    if not recipe.bf16:
        return 0, 0
    copied = [p for p in parameters if p.layer is not None and p.itemsize == 4 and (p.linear or p.adapter)]
    if not stage.activation_checkpointing:
        whole = 2 * sum(p.count for p in copied)
        return whole, whole
    return 2 * sum(p.count for p in copied if p.trained), 2 * sum(p.count for p in copied if p.layer == 0)


def _loss(config: PreTrainedConfig, batch: Batch, training: Training, head: int, gpu: bool) -> int:
    """TRL's fused output layer and cross entropy in the backward pass: one tile of logits and float32 gradients.

    `head` is the number of the output layer's weights if they train, else 0.
    """
    hidden, compute = config.hidden_size, training.compute
    tile = min(batch.tokens, _TILE_TOKENS) * _TILE_VOCABULARY
    size = compute * (tile + _TILE_VOCABULARY * hidden)  # … and the slice of the weights in the products' dtype
    if not gpu:  # without Triton the tile is worked on in float32, in three steps
        size += 3 * 4 * min(batch.tokens, _TILE_TOKENS) * min(config.vocab_size, _TILE_VOCABULARY)
    return size + 4 * hidden * batch.tokens + 4 * head


def _passing(config: PreTrainedConfig, batch: Batch, training: Training) -> int:
    """Gradients of activations at work: of the residual stream, and of two of the feed-forward's products."""
    return batch.tokens * (4 * config.hidden_size + 2 * training.compute * config.intermediate_size)
