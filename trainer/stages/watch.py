"""What is watched while a stage trains: figures, signals, divergence."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.stages.checkpoints import forget_after, read_metrics
from trainer.stages.view import View

_KEPT = (
    "loss",
    "learning_rate",
    "grad_norm",
    "mean_token_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "eval_loss",
    "eval_mean_token_accuracy",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
)
# A smoothed loss above twice its best plus one nat does not come back by itself.
_SMOOTHING, _FACTOR, _NATS = 0.3, 2.0, 1.0


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: a checkpoint was written, the same command continues."""


class Watch(TrainerCallback):
    """Feeds the view and metrics.jsonl, turns signals into a checkpoint and a diverging loss into an error.

    `flops_per_token` and `peak_flops` (of one device, per second) give the model FLOPs utilisation; 0 leaves it out.
    `stop` makes the error for a bad batch (StageLoop.stop).
    """

    def __init__(self, stage: str, metrics_file: Path, view: View) -> None:
        self.stage = stage
        self.metrics_file = metrics_file
        self.view = view
        self.interrupted = False
        self.tokens = 0.0
        self.flops_per_token = 0.0
        self.peak_flops = 0.0
        self.stop: Callable[[str], Exception] | None = None
        self.started = time.monotonic()
        self._earlier_seconds = 0.0
        self._earlier_tokens = 0.0
        self._busy = 0.0
        self._busy_since = 0.0
        self._last: tuple[float, float] = (0.0, 0.0)  # tokens, busy seconds at the last log
        self._smooth: float | None = None
        self._best = float("inf")
        self._signals: dict[int, Any] = {}

    @property
    def seconds(self) -> float:
        """Wall time of the stage, over all its continuations."""
        return self._earlier_seconds + time.monotonic() - self.started

    def begin(self, state: TrainerState) -> None:
        """Takes up the stage where `state` has it."""
        if state.is_world_process_zero:
            forget_after(self.metrics_file, self.stage, state.global_step)
            earlier = [row for row in read_metrics(self.metrics_file) if row["stage"] == self.stage]
            self._earlier_seconds = max((row.get("seconds", 0.0) for row in earlier), default=0.0)
            self._earlier_tokens = max((row.get("tokens", 0.0) for row in earlier), default=0.0)
            self.tokens = self._earlier_tokens
            self._last = (self.tokens, 0.0)
        self.view.stage(self.stage, state.global_step, state.max_steps)
        for row in state.log_history:
            if "loss" in row:
                self._smoothen(row["loss"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin(state)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._signals[number] = signal.signal(number, self._interrupt)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._busy_since = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._busy += time.monotonic() - self._busy_since
        self.view.step(state.global_step)
        if self._anyone_interrupted(args):
            self.interrupted = control.should_save = control.should_training_stop = True
        # A checkpoint knows its tokens, and a stage its last loss.
        if control.should_save or control.should_evaluate or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        figures = {key: float(logs[key]) for key in _KEPT if key in logs}
        if "loss" in figures:
            figures |= self._speed(logs, args)
        if state.is_world_process_zero:
            row = {"stage": self.stage, "step": state.global_step, **figures, "seconds": round(self.seconds, 1)}
            append_row(self.metrics_file, row)
        self.view.figures(state.global_step, state.max_steps, figures)
        if "loss" in figures:
            self._check_divergence(figures["loss"])

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._signals.items():
            signal.signal(number, handler)

    def _speed(self, logs: Mapping[str, Any], args: TrainingArguments) -> dict[str, float]:
        self.tokens = self._earlier_tokens + float(logs.get("num_tokens", 0.0))
        tokens, busy = self.tokens - self._last[0], self._busy - self._last[1]
        self._last = (self.tokens, self._busy)
        figures = {"tokens": self.tokens, "memory_bytes": float(peak_memory())}
        if busy > 0 and tokens > 0:
            figures["tokens_per_second"] = round(tokens / busy, 1)
            if self.flops_per_token and self.peak_flops:
                used = figures["tokens_per_second"] * self.flops_per_token
                figures["mfu"] = round(used / (self.peak_flops * args.world_size), 4)
        return figures

    def _check_divergence(self, loss: float) -> None:
        smooth = self._smoothen(loss)
        if smooth > _FACTOR * self._best + _NATS and self.stop is not None:
            raise self.stop(f"the loss diverges (smoothed {smooth:.3f}, it was {self._best:.3f})")

    def _smoothen(self, loss: float) -> float:
        self._smooth = loss if self._smooth is None else _SMOOTHING * loss + (1 - _SMOOTHING) * self._smooth
        self._best = min(self._best, self._smooth)
        return self._smooth

    def _anyone_interrupted(self, args: TrainingArguments) -> bool:
        """All processes must stop at the same step, whichever of them the signal reached first."""
        if args.world_size == 1:
            return self.interrupted
        flag = torch.tensor(int(self.interrupted), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self.view.say(f"{name}: writing a checkpoint at the next step (Ctrl-C again to leave at once)…")


class EarlyStop(TrainerCallback):
    """Stops after `patience` evaluations without a better held-out loss.

    It counts in the trainer's own history, which every checkpoint holds, so a resumed stage stops where it would
    have (transformers' callback starts to count again).
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.exhausted(state):
            control.should_training_stop = True

    def exhausted(self, state: TrainerState) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        losses = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Appends one row to metrics.jsonl."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def peak_memory() -> int:
    """Peak bytes: allocated on the GPU, or resident in RAM where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)
