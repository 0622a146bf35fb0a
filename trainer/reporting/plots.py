"""Pictures of a run: loss, throughput and held-out figures. Labels are English: not every machine has Chinese fonts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from trainer.recipe import STAGES
from trainer.stages.checkpoints import read_metrics

LABELS = {"start": "start", "cpt": "CPT", "sft": "SFT", "dfpo": "DFPO", "mue": "PSFT"}
_TRAINED, _HELD_OUT = "#7aa6c2", "#b03a2e"


def plot_losses(folder: Path) -> Path | None:
    """Training and evaluation loss of every stage into plots/loss.png; None when nothing was logged."""
    rows = read_metrics(folder / "metrics.jsonl")
    stages = [stage for stage in STAGES if _points(rows, stage, "loss") or _points(rows, stage, "eval_loss")]
    if not stages:
        return None
    figure, axes = _panels(len(stages))
    for axis, stage in zip(axes, stages, strict=True):
        _line(axis, _points(rows, stage, "loss"), color=_TRAINED, label="training")
        _line(axis, _points(rows, stage, "eval_loss"), color=_HELD_OUT, marker="o", markersize=3, label="held-out")
        _stage_axis(axis, stage)
        axis.legend(frameon=False)
    axes[0].set_ylabel("loss")
    return _save(figure, folder, "loss")


def plot_throughput(folder: Path) -> Path | None:
    """Tokens per second, and MFU where it is known, of every stage into plots/throughput.png."""
    rows = read_metrics(folder / "metrics.jsonl")
    stages = [stage for stage in STAGES if _points(rows, stage, "tokens_per_second")]
    if not stages:
        return None
    figure, axes = _panels(len(stages))
    for axis, stage in zip(axes, stages, strict=True):
        _line(axis, _points(rows, stage, "tokens_per_second"), color=_TRAINED)
        _stage_axis(axis, stage)
        axis.set_ylim(bottom=0)
        if used := _points(rows, stage, "mfu"):
            other = axis.twinx()
            _line(other, [(step, 100 * share) for step, share in used], color=_HELD_OUT)
            other.set_ylim(0, 100)
            other.set_ylabel("MFU, %", color=_HELD_OUT)
    axes[0].set_ylabel("tokens per second", color=_TRAINED)
    return _save(figure, folder, "throughput")


def plot_held_out(folder: Path, held_out: Mapping[str, Mapping[str, float]]) -> Path | None:
    """Held-out figures at the start and after each stage into plots/held_out.png.

    `held_out` is run.json's: {"start" | stage: {figure: value}}.
    """
    columns = [name for name in LABELS if held_out.get(name)]
    names = dict.fromkeys(name for column in columns for name in held_out[column])
    groups = {
        "answers, nats per token": [name for name in names if name.startswith("assistant_loss")],
        "perplexity per token": [name for name in names if name.endswith("_perplexity")],
        "preference accuracy": [name for name in names if name == "preference_accuracy"],
        "preference margin, nats per token": [name for name in names if name == "preference_margin"],
        "preference log odds, nats": [name for name in names if name == "preference_log_odds"],
    }
    groups = {title: members for title, members in groups.items() if members}
    if not groups:
        return None
    figure, axes = _panels(len(groups), columns=3)
    for axis, (title, members) in zip(axes, groups.items(), strict=True):
        for name in members:
            values = [held_out[column].get(name, math.nan) for column in columns]
            axis.plot([LABELS[column] for column in columns], values, marker="o", markersize=3, label=_short(name))
        axis.set_title(title)
        if len(members) > 1:
            axis.legend(frameon=False, fontsize=8)
        if title.startswith("perplexity"):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        if title.endswith("accuracy"):
            axis.set_ylim(0, 1.05)
    return _save(figure, folder, "held_out")


def _short(name: str) -> str:
    if name == "assistant_loss":
        return "all tasks"
    return name.removeprefix("assistant_loss/").removesuffix("_perplexity").replace("_", " ")


def _points(rows: Sequence[Mapping[str, Any]], stage: str, key: str) -> list[tuple[float, float]]:
    return [(row.get("step", 0), row[key]) for row in rows if row.get("stage") == stage and row.get(key) is not None]


def _line(axis: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), **style)


def _stage_axis(axis: Any, stage: str) -> None:
    axis.set(title=LABELS[stage], xlabel="step")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _panels(count: int, columns: int = 4) -> tuple[Figure, list[Any]]:
    lines, used = -(-count // columns), min(columns, count)
    figure = Figure(figsize=(15.2 * used / columns, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, used, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _save(figure: Figure, folder: Path, name: str) -> Path:
    picture = folder / "plots" / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=110)
    return picture
