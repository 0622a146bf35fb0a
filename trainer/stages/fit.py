"""Trains one stage to its end, from its last sound checkpoint if there is one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerState

from trainer.planning.flops import flops_per_token, peak_flops
from trainer.stages.checkpoints import last_sound, read_metrics, step_of
from trainer.stages.loop import elements
from trainer.stages.view import View
from trainer.stages.watch import EarlyStop, Interrupted, Watch


def fit(trainer: Any, name: str, metrics: Path, view: View, gpu: bool) -> tuple[dict[str, Any], bool]:
    """Returns the stage's entry for run.json, and whether a signal came in its last step.

    Raises Interrupted after a signal in any other step, StageError when the stage must stop.
    """
    checkpoints = Path(trainer.args.output_dir)
    if trainer.accelerator.is_main_process:
        shutil.rmtree(checkpoints.with_name(f"{checkpoints.name}.part"), ignore_errors=True)
        last, warnings = last_sound(checkpoints)
        for note in [*warnings, *trainer.notes, *([f"continuing from {last.name}"] if last else [])]:
            view.say(f"{name}: {note}")
    trainer.accelerator.wait_for_everyone()
    last = max(checkpoints.glob("checkpoint-*"), key=step_of, default=None)
    watch = _watch(trainer, name, metrics, view, gpu)
    try:
        if last and _is_finished(trainer, last):
            watch.begin(trainer.state)
            trainer.take_up(last)
        else:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        watch.close()
    if watch.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    rows = [row for row in read_metrics(metrics) if row["stage"] == name and "loss" in row]
    result = {
        "steps": trainer.state.global_step,
        "loss": rows[-1]["loss"] if rows else None,
        "seconds": round(watch.seconds, 1),
        "tokens": int(watch.tokens),
        "gpu_hours": round(watch.seconds / 3600 * trainer.args.world_size, 4) if gpu else 0.0,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "best_step": trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
        "stopped_early": trainer.state.global_step < trainer.state.max_steps,
        "notes": list(trainer.notes),
    }
    return result, watch.interrupted


def _is_finished(trainer: Any, checkpoint: Path) -> bool:
    """Whether a stage was killed after its last step: the trainer would go one step beyond.

    Sharded models can be loaded only by going on; at the end of an epoch that is no step.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    over = state.global_step >= state.max_steps or (trainer.patience and EarlyStop(trainer.patience).exhausted(state))
    if not over or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return False
    trainer.state = state
    return True


def _watch(trainer: Any, name: str, metrics: Path, view: View, gpu: bool) -> Watch:
    watch = Watch(name, metrics, view)
    watch.stop = trainer.stop
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        watch.peak_flops = peak_flops(torch.cuda.get_device_name())
    parameters = list(trainer.model.parameters())
    trained = sum(elements(p) for p in parameters if p.requires_grad)
    watch.flops_per_token = flops_per_token(trainer.model.config, trained, sum(map(elements, parameters)))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    if trainer.patience:
        trainer.add_callback(EarlyStop(trainer.patience))
    return watch
