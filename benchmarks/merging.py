"""What merging the experts keeps of their gain, on dialogues held out by disease: several seeds, mean ± deviation.

    pediatricsgpt train benchmarks/recipes/real.yaml seed=1 stages.mue.learning_rate=4e-3 -o runs/merge/seed-1   (2, 3)
    python benchmarks/merging.py --runs runs/merge/seed-1 runs/merge/seed-2 runs/merge/seed-3 [--variants] [--json]

Each run's experts are merged on its calibration.jsonl by every method; all merges and the live model are measured on
its held_out.jsonl. `--variants` adds what other settings make of least squares. Exit code 1: a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.progress import Progress

from quantize.errors import BadInput
from quantize.hugging_face import suitable_threads
from quantize.live import Live
from quantize.merging.collect import CONTEXT_WEIGHT, DAMPING, least_squares
from quantize.merging.experts import Adapter
from quantize.merging.measure import measure
from quantize.merging.merge import merge_experts, split, table_of
from quantize.run_folder import RunFolder

GOALS = {"least-squares": 0.90, "per task": 0.95}
VARIANTS: dict[str, dict[str, Any]] = {
    f"damping {DAMPING / 10:g}": {"damping": DAMPING / 10},
    f"damping {DAMPING * 10:g}": {"damping": DAMPING * 10},
    "all tokens weigh the same": {"context_weight": 1.0},
    "answers' tokens only": {"context_weight": 0.0},
    "a quarter of the dialogues": {"share": 4},
    "rank 16 of 32": {"rank": 16},
    "rank 8 of 32": {"rank": 8},
}
_COLUMNS = (("nll", 4), ("kept", 3), ("kld", 4), ("top1", 3), ("layer_error", 3))


def study(folder: Path, variants: bool, progress: Any) -> list[dict[str, Any]]:
    """The rows of one run's table: the report's, then the variants'."""
    run = RunFolder.open(folder)
    live = Live(run.checkpoint, run.adapter)
    with tempfile.TemporaryDirectory() as work:
        merged = merge_experts(
            live, Adapter(run.adapter), run.calibration, run.held_out, "least-squares", Path(work), progress
        )
        assert merged.report is not None
        table = merged.report["table"]
        if not variants:
            return table
        fitted, measured, _ = split(live, run.calibration, run.held_out)
        made = {}
        for number, (name, settings) in enumerate(VARIANTS.items(), 1):
            dialogues = fitted[:: settings.get("share", 1)]
            options = {key: value for key, value in settings.items() if key != "share"}
            made[name] = {"": least_squares(live, dialogues, Path(work), lambda *_: None, **options)}
            progress(f"Variants of {folder.name}", number, len(VARIANTS))
        figures = measure(live, made, measured, lambda: None)
    return table + [row for row in table_of(figures) if row["name"] in made]


def summary(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per merge: [mean, standard deviation] over runs of every figure."""
    rows = []
    for same in zip(*tables, strict=True):
        row: dict[str, Any] = {"name": same[0]["name"]}
        figures = {key: [found[key] for found in same] for key, _ in _COLUMNS}
        figures |= {f"nll/{task}": [f["nll_by_task"][task] for f in same] for task in same[0]["nll_by_task"]}
        for key, values in figures.items():
            if None not in values:
                row[key] = [fmean(values), stdev(values) if len(values) > 1 else 0.0]
        rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    tasks = [key for key in rows[0] if key.startswith("nll/")]
    heads = ["merge", "nats per token", "gain kept", "KLD to live", "same first choice", "layer error"]
    lines = ["| " + " | ".join([*heads, *(task.removeprefix("nll/") for task in tasks)]) + " |"]
    lines.append("|---" * (len(heads) + len(tasks)) + "|")
    for row in rows:
        cells = [
            f"{row[key][0]:.{digits}f} ± {row[key][1]:.{digits}f}" if key in row else "–"
            for key, digits in (*_COLUMNS, *((task, 3) for task in tasks))
        ]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs the study; 0 when both goals hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--variants", action="store_true", help="also least squares with other settings")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object")
    arguments = parser.parse_args(argv)
    tables = []
    try:
        with Progress(console=Console(stderr=True)) as bars, suitable_threads(0):
            for folder in arguments.runs:
                tasks: dict[str, Any] = {}

                def show(label: str, done: int, total: int, tasks: dict[str, Any] = tasks) -> None:
                    if label not in tasks:
                        tasks[label] = bars.add_task(label, total=total)
                    bars.update(tasks[label], completed=done)

                tables.append(study(folder, arguments.variants, show))
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    rows = summary(tables)
    kept = {row["name"]: row["kept"][0] for row in rows if "kept" in row}
    held = {name: kept.get(name, 0.0) >= goal for name, goal in GOALS.items()}
    if arguments.json:
        print(json.dumps({"runs": len(tables), "rows": rows, "goals_held": held}, ensure_ascii=False))
    else:
        print(markdown(rows))
        print(f"\nContext weight {CONTEXT_WEIGHT}, damping {DAMPING}; mean ± standard deviation of {len(tables)} runs.")
        for name, goal in GOALS.items():
            print(f"{name}: goal ≥ {goal:.2f}, {'held' if held[name] else 'MISSED'}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
