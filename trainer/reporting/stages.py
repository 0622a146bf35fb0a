"""The stages in tables, from run.json's record and the rows of metrics.jsonl. What is missing is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from pydantic import ValidationError

from trainer.recipe import STAGES, Recipe
from trainer.reporting.formats import duration, markdown, number, size, span
from trainer.reporting.plots import LABELS

Record = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def stages_begun(record: Record, rows: Rows) -> list[str]:
    """The stages that are done or have logged something."""
    logged = {row.get("stage") for row in rows}
    return [stage for stage in STAGES if stage in record.get("stages", {}) or stage in logged]


def stage_table(record: Record, rows: Rows) -> str:
    """Figures of every stage that has begun: a line each, a column per stage."""
    begun = stages_begun(record, rows)
    done = record.get("stages", {})
    header = ["", *(LABELS[stage] + ("" if stage in done else " (not finished)") for stage in begun)]
    columns = [_stage_cells(record, stage, [row for row in rows if row.get("stage") == stage]) for stage in begun]
    names = [name for name in columns[0] if any(column[name] for column in columns)] if columns else []
    return markdown(header, ([name, *(column[name] or "–" for column in columns)] for name in names))


def _stage_cells(record: Record, stage: str, rows: Rows) -> dict[str, str]:
    """The column of one stage; a figure that is not known is ''."""
    done = record.get("stages", {}).get(stage, {})
    hours, unit = compute_hours(record, stage, rows)
    seconds = done.get("seconds", _last(rows, "seconds"))
    memory = done.get("peak_memory_bytes") or max(_values(rows, "memory_bytes"), default=None)
    speeds, used = _values(rows, "tokens_per_second"), _values(rows, "mfu")
    tried = _values(rows, "eval_loss")
    rewards = "eval_rewards" if _values(rows, "eval_rewards/accuracies") else "rewards"
    return {
        "steps": number(done.get("steps", _last(rows, "step"))),
        "tokens": number(done.get("tokens")),
        "training loss, first → last": span(_values(rows, "loss")),
        "held-out loss, first → last": span(tried),
        "held-out loss, best": number(min(tried)) if tried else "",
        "reward accuracy, first → last": span(_values(rows, f"{rewards}/accuracies")),
        "reward margin, first → last": span(_values(rows, f"{rewards}/margins")),
        "tokens per second (median)": number(round(median(speeds))) if speeds else "",
        "MFU (median)": f"{100 * median(used):.1f} %" if used else "",
        "peak memory": size(memory),
        "wall time": duration(seconds),
        unit: f"{hours:.3f}" if hours is not None else "",
        "best step": number(done.get("best_step")),
        "stopped early": {True: "yes", False: "no"}.get(done.get("stopped_early"), ""),
    }


def compute_hours(record: Record, stage: str, rows: Rows) -> tuple[float | None, str]:
    """Hours of one stage and their unit: of GPUs, or of the threads of all processes where there is no GPU."""
    hardware = record.get("hardware", {})
    done = record.get("stages", {}).get(stage, {})
    seconds = done.get("seconds", _last(rows, "seconds"))
    if hardware.get("gpus"):
        if done.get("gpu_hours") is not None:
            return done["gpu_hours"], "GPU-hours"
        gpus = hardware.get("processes") or 1  # one per process: more than one in a process is not trained on
        return (None if seconds is None else seconds * gpus / 3600), "GPU-hours"
    threads = (hardware.get("threads") or 1) * (hardware.get("processes") or 1)
    return (None if seconds is None else seconds * threads / 3600), "CPU-hours"


def settings_table(record: Record) -> str:
    """Every setting of every stage: ″ is inherited from the stage before, bold is set otherwise than there."""
    try:
        # The stages alone matter here, not where the corpus came from.
        recipe = Recipe.model_validate({**record["recipe"], "corpus": {"records": "."}})
    except (ValidationError, KeyError, TypeError):
        return ""
    columns: list[dict[str, str]] = []
    for stage in STAGES:
        inherited, overridden = recipe.inheritance(stage)
        cells = {key: _setting(value) for key, value in recipe.stage(stage).model_dump(mode="json").items()}
        cells |= {key: "″" for key in inherited}
        columns.append(cells | {key: f"**{cells[key]}**" for key in overridden})
    keys = dict.fromkeys(key for column in columns for key in column)
    header = ["setting", *(LABELS[stage] for stage in STAGES)]
    return markdown(header, ([f"`{key}`", *(column.get(key, "") for column in columns)] for key in keys))


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return ", ".join(map(str, value)).replace("_proj", "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _last(rows: Rows, key: str) -> Any:
    return next(reversed(_values(rows, key)), None)
