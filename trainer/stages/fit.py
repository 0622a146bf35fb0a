"""Trains one stage to its end, from its last sound checkpoint if there is one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback

from trainer.planning.flops import flops_per_token, peak_flops
from trainer.stages.checkpoints import last_sound, read_metrics, step_of
from trainer.stages.loop import elements
from trainer.stages.view import View
from trainer.stages.watch import Interrupted, Watch


def fit(trainer: Any, name: str, metrics: Path, view: View, gpu: bool) -> dict[str, Any]:
    """Returns the stage's entry for run.json; raises Interrupted after Ctrl-C, StageError when it must stop."""
    checkpoints = Path(trainer.args.output_dir)
    last = None
    if trainer.accelerator.is_main_process:
        shutil.rmtree(checkpoints.with_name(f"{checkpoints.name}.part"), ignore_errors=True)
        last, notes = last_sound(checkpoints)
        for note in notes:
            view.say(f"{name}: {note}")
        if last:
            view.say(f"{name}: continuing from {last.name}")
    trainer.accelerator.wait_for_everyone()
    last = max(checkpoints.glob("checkpoint-*"), key=step_of, default=None)
    watch = _watch(trainer, name, metrics, view, gpu)
    try:
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        watch.close()
    if watch.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    losses = [row["loss"] for row in read_metrics(metrics) if row["stage"] == name and "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "loss": losses[-1] if losses else result.training_loss,
        "seconds": round(watch.seconds, 1),
        "tokens": int(watch.tokens),
        "gpu_hours": round(watch.seconds / 3600 * trainer.args.world_size, 4) if gpu else 0.0,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "best_step": best,
        "stopped_early": watch.stopped_early,
    }


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
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=trainer.patience))
    return watch
