"""What a run says when the machine fails it: memory and disk, in whatever words the libraries put it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from trainer.folder import RunError
from trainer.recipe import DenseStage, StageRecipe

_NO_SPACE = "No space left"
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def explained(error: Exception, folder: Path, name: str | None, stage: StageRecipe | None) -> RunError | None:
    """The error for the user when memory or disk have run out (in a stage, if one is given); None for anything else."""
    text = str(error)
    full = shutil.disk_usage(folder if folder.exists() else Path()).free < 1_000_000 or _NO_SPACE in text
    if full or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return RunError(f"The disk of {folder} is full. Make room; the same command continues.")
    if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        if name is None or stage is None:
            return RunError("The model does not fit into memory even to be measured. Take a smaller base.")
        return RunError(_memory_advice(name, stage))
    return None


def _memory_advice(name: str, stage: StageRecipe) -> str:
    steps = []
    if not stage.activation_checkpointing:
        steps.append(f"stages.{name}.activation_checkpointing=true (about a third slower)")
    if stage.batch_size > 1:
        steps.append(
            f"stages.{name}.batch_size={stage.batch_size // 2} "
            f"stages.{name}.gradient_accumulation={stage.gradient_accumulation * 2} (same steps, less at a time)"
        )
    if isinstance(stage, DenseStage) and stage.method == "full":
        sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
        small = "" if sharded else f"stages.{name}.optimizer=adamw_8bit, or "
        steps.append(f"{small}stages.{name}.method=lora")
    elif not stage.load_in_4bit:
        steps.append(f"stages.{name}.load_in_4bit=true")
    steps.append(f"stages.{name}.max_length={stage.max_length // 2} (cuts more off: see `pediatricsgpt plan`)")
    return (
        f"{name.upper()} does not fit into memory. In this order, one at a time, with --accept-changes (the stage "
        "starts again, and later stages that do not say otherwise inherit the change):\n  " + "\n  ".join(steps)
    )
