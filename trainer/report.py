"""report.md: what a run did, what it cost and what it did to the model. Works while the run still goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.recipe import STAGES
from trainer.reporting.forgetting import forgetting_notes, held_out_table, purpose_table
from trainer.reporting.plots import LABELS, plot_held_out, plot_losses, plot_throughput
from trainer.reporting.stages import Record, Rows, compute_hours, settings_table, stage_table, stages_begun
from trainer.stages.checkpoints import read_metrics

_DISCLAIMER = """> A demonstration of a training method, not a medical device. The figures below are losses on held-out
> text; none of them says that an answer is medically right. Nothing here was reviewed for use with patients.
"""


REPORT = "report.md"


class ReportError(ValueError):
    """A folder that is no run; the message names the cause and the remedy."""


def write_report(folder: Path) -> Path:
    """Writes report.md and its plots from run.json and metrics.jsonl; returns its path.

    Raises ReportError when the folder has no readable run.json.
    """
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{folder} is not a run folder: run.json cannot be read ({error}). Give the folder that "
            "`pediatricsgpt train` writes, for example runs/demo."
        ) from None
    rows = read_metrics(folder / "metrics.jsonl")
    held_out = record.get("held_out", {})
    pictures = [plot_losses(folder), plot_throughput(folder), plot_held_out(folder, held_out)]
    pictures += sorted((folder / "plots").glob("router*.png"))
    sections = [
        f"# {record.get('name', folder.name)}\n",
        _DISCLAIMER,
        _summary(record, rows),
        _section("Stages", stage_table(record, rows) if stages_begun(record, rows) else "Nothing was logged yet.\n"),
        _section("What each stage was for", purpose_table(record)),
        _section("Forgetting", _forgetting(held_out)),
        _section("Settings", _settings(record)),
        _section("Plots", "\n".join(f"![{path.stem}](plots/{path.name})\n" for path in pictures if path)),
        _section("Samples", _samples(folder)),
        _section("Environment", _environment(record)),
    ]
    report = folder / REPORT
    part = report.with_suffix(".part")
    part.write_text("\n".join(section for section in sections if section), encoding="utf-8")
    part.replace(report)
    return report


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _summary(record: Record, rows: Rows) -> str:
    recipe = record.get("recipe", {})
    shape = recipe.get("model") or {}
    origin = f"from `{recipe['base']}`" if recipe.get("base") else "from random weights"
    if shape:
        origin += f", {shape.get('layers')} layers of width {shape.get('hidden_size')} (Qwen3 architecture)"
    done = [stage for stage in STAGES if stage in record.get("stages", {})]
    running = [stage for stage in stages_begun(record, rows) if stage not in done]
    state = "finished" if len(done) == len(STAGES) else f"not finished; done: {', '.join(map(LABELS.get, done)) or '–'}"  # type: ignore[arg-type]
    if running:
        steps = [row["step"] for row in rows if row.get("stage") == running[-1] and "step" in row]
        state += f"; {LABELS[running[-1]]} is at step {steps[-1] if steps else 0}"
    return f"- recipe: {recipe.get('name', '–')}, {origin}\n- state: {state}\n- cost: {_cost(record, rows)}\n"


def _cost(record: Record, rows: Rows) -> str:
    """Sum over the stages, without evaluations between them."""
    parts = [
        compute_hours(record, stage, [row for row in rows if row.get("stage") == stage])
        for stage in stages_begun(record, rows)
    ]
    known = [hours for hours, _ in parts if hours is not None]
    return f"{sum(known):.3f} {parts[0][1]}" if known else "not known yet"


def _forgetting(held_out: dict[str, dict[str, float]]) -> str:
    if not any(held_out.values()):
        return "No held-out figures were measured yet.\n"
    notes = forgetting_notes(held_out) or ["No stage raised general perplexity by more than 10 %."]
    legend = (
        "▲▼ change against the column before; **bold** is worse by more than 1 %. Perplexities and losses are better\n"
        "low, preference figures high. Bits per character compare models with different tokenizers.\n"
    )
    return f"{held_out_table(held_out)}\n{legend}\n" + "".join(f"{note}\n\n" for note in notes).rstrip("\n") + "\n"


def _settings(record: Record) -> str:
    table = settings_table(record)
    legend = "″ is inherited from the stage before that has it, **bold** is set otherwise than there.\n"
    return f"{table}\n{legend}" if table else "The recipe in run.json is of another version and cannot be shown.\n"


def _samples(folder: Path) -> str:
    exists = (folder / "samples.md").exists()
    return "Answers to the same questions along the run: [samples.md](samples.md).\n" if exists else ""


def _environment(record: Record) -> str:
    hardware: dict[str, Any] = record.get("hardware", {})
    gpus = f"{hardware['gpus']} × {hardware.get('gpu_name') or 'GPU'}" if hardware.get("gpus") else "no GPU"
    lines = {
        "created": record.get("created"),
        "git commit": record.get("git_commit"),
        "seed": record.get("seed"),
        "corpus sha256": record.get("corpus_sha256"),
        "hardware": f"{gpus}, {hardware.get('cpus', '?')} CPU cores, {hardware.get('threads', '?')} threads × "
        f"{hardware.get('processes', 1)} process(es)",
        "versions": ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items()),
    }
    return "".join(f"- {name}: {value}\n" for name, value in lines.items() if value not in (None, ""))
