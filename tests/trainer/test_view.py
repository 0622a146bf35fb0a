"""The live view: a bar and figures on a terminal, a line now and then in a log; tokens of a resumed stage."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from trainer.stages.checkpoints import read_metrics
from trainer.stages.view import View
from trainer.stages.watch import Watch

FIGURES = {
    "loss": 2.5,
    "learning_rate": 1e-4,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
    "mfu": 0.47,
    "memory_bytes": 21.3e9,
}


def _console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=90, color_system=None)


def _said(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_terminal_shows_bar_and_figures() -> None:
    console = _console(terminal=True)
    with View(console) as view:
        view.stage("sft", 3, 10)
        view.figures(4, 10, FIGURES)
        view.step(4)
        view._live.refresh()
    for part in ("SFT", "4/10", "loss 2.500", "lr 1.0e-04", "|g| 0.50", "12,346 tok/s", "MFU 47%", "21.3 GB"):
        assert part in _said(console), part


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    console = _console(terminal=False)
    with View(console) as view:
        view.stage("cpt", 0, 100)
        for step in range(1, 101):
            view.figures(step, 100, FIGURES)
    lines = _said(console).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["CPT 1/100", "CPT 100/100"]


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)


def _watch(folder: Path) -> Watch:
    return Watch("sft", folder / "metrics.jsonl", View(_console(terminal=False)))


def _log(watch: Watch, arguments: TrainingArguments, step: int, tokens: float) -> None:
    state, control = TrainerState(global_step=step, max_steps=10, is_world_process_zero=True), TrainerControl()
    watch.on_step_begin(arguments, state, control)
    watch.on_step_end(arguments, state, control)
    logs: dict[str, Any] = {"loss": 1.0, "num_tokens": tokens}
    watch.on_log(arguments, state, control, logs=logs)


def test_tokens_and_seconds_go_on_after_a_resume(tmp_path: Path, arguments: TrainingArguments) -> None:
    first = _watch(tmp_path)
    state = TrainerState(global_step=0, max_steps=10, is_world_process_zero=True)
    first.on_train_begin(arguments, state, TrainerControl())
    first.close()
    for step in range(1, 5):
        _log(first, arguments, step, 100.0 * step)
    second = _watch(tmp_path)
    second.on_train_begin(
        arguments, TrainerState(global_step=2, max_steps=10, is_world_process_zero=True), TrainerControl()
    )
    second.close()
    for step in range(3, 5):  # TRL counts from nothing again
        _log(second, arguments, step, 100.0 * (step - 2))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["tokens"]) for row in rows] == [(1, 100), (2, 200), (3, 300), (4, 400)]
    assert second.tokens == 400


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_for_a_checkpoint_and_the_stop(
    tmp_path: Path, arguments: TrainingArguments, number: signal.Signals
) -> None:
    watch = _watch(tmp_path)
    state, control = TrainerState(global_step=0, max_steps=10, is_world_process_zero=True), TrainerControl()
    before = signal.getsignal(number)
    watch.on_train_begin(arguments, state, control)
    signal.raise_signal(number)
    watch.on_step_begin(arguments, state, control)
    watch.on_step_end(arguments, state, control)
    assert control.should_save
    assert control.should_training_stop
    if number == signal.SIGINT:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    watch.close()
    assert signal.getsignal(number) is before
