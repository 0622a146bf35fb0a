"""What the stages share: training arguments, progress, metrics, interruption, resuming."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.recipe import Recipe, StageRecipe
from trainer.stages.checkpoints import forget_after, last_complete


class Interrupted(Exception):
    """Ctrl-C: a checkpoint was written, the same command continues."""


def training_arguments(recipe: Recipe, stage: StageRecipe, checkpoints: Path) -> dict[str, Any]:
    """Keyword arguments that every TRL config of ours shares."""
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(checkpoints),
        "num_train_epochs": stage.epochs,
        "per_device_train_batch_size": stage.batch_size,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "max_length": stage.max_length,
        "logging_steps": stage.log_every,
        "save_steps": stage.save_every,
        "save_total_limit": 2,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": recipe.bf16,
        "use_cpu": not on_gpu,
        # Recomputing activations saves memory that models of this size do not need.
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": on_gpu,
        # Padding is the waste of short dialogues: sequences of like length share a batch.
        "train_sampling_strategy": "group_by_length",
    }


class Watch(TrainerCallback):
    """Shows a progress bar, writes metrics.jsonl and turns Ctrl-C into a checkpoint."""

    def __init__(self, stage: str, metrics_file: Path, progress: Progress) -> None:
        self.stage = stage
        self.metrics_file = metrics_file
        self.progress = progress
        self.interrupted = False
        self.started = time.monotonic()
        self.bar = progress.add_task(stage.upper(), total=None, loss="")
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        forget_after(self.metrics_file, self.stage, state.global_step)
        self.progress.update(self.bar, total=state.max_steps, completed=state.global_step)
        self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        keep = (
            "loss",
            "learning_rate",
            "grad_norm",
            "mean_token_accuracy",
            "rewards/accuracies",
            "rewards/margins",
        )
        row = {
            "stage": self.stage,
            "step": state.global_step,
            **{key: float(logs[key]) for key in keep if key in logs},
        }
        row["seconds"] = round(time.monotonic() - self.started, 1)
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.progress.update(self.bar, loss=f"loss {row['loss']:.3f}")

    def close(self) -> None:
        """Gives Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.progress.console.print("Ctrl-C: writing a checkpoint after this step (again to leave at once)…")


def progress_bars(console: Console) -> Progress:
    """The progress display of a run: one bar per stage, with the loss."""
    return Progress(
        TextColumn("[bold]{task.description:<5}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(elapsed_when_finished=True), console=console,
    )  # fmt: skip


def fit(trainer: Trainer, watch: Watch, checkpoints: Path) -> dict[str, Any]:
    """Trains, continuing from the last complete checkpoint if there is one; raises Interrupted after Ctrl-C."""
    last, unfinished = last_complete(checkpoints)
    for name in unfinished:
        watch.progress.console.print(f"{watch.stage}: {name} was not finished and is left out")
    if last:
        watch.progress.console.print(f"{watch.stage}: continuing from {last.name}")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    try:
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        watch.close()
    if watch.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    return {
        "steps": trainer.state.global_step,
        "loss": result.training_loss,
        "seconds": round(time.monotonic() - watch.started, 1),
    }
