"""What the commands share: their parser, their progress bars, the table of checks, and how errors are said."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quantize.errors import BadInput
from quantize.merging.table import merge_rows

# What a person reads for the name of a check in fidelity.json.
_LABELS = {
    "opens": "opens in llama.cpp",
    "checksum": "sha256",
    "header": "wrong header values",
    "types": "types of the tensors",
    "token_ids": "texts with other token ids",
    "text_restored": "texts that tokens do not restore",
    "typed_control_text": "typed text read as control",
    "chat_template": "renderings that differ",
    "append_only": "turns that rewrite earlier ones",
    "eos": "an answer's end ends it",
    "generation_ends": "greedy answers that end",
    "eos_after_answer": "ends of given answers missed",
    "top1": "same first choice",
    "kld": "KL divergence, mean, nats",
    "kld99": "KL divergence, 99 %, nats",
    "dp": "change of probability, RMS",
    "perplexity": "perplexity, ratio",
    "weights": "largest error of a tensor",
    "weight_bits": "weights with other bits",
}


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help keeps its line breaks."""
    return argparse.ArgumentParser(
        prog=f"pediatricsgpt {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def guarded(
    work: Callable[[argparse.Namespace, Console], int], parser: argparse.ArgumentParser, argv: list[str]
) -> int:
    """Parses and works; returns the exit code. What the user can mend becomes one red message and 2, Ctrl-C 130."""
    console = Console(stderr=True)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as error:
        return int(error.code or 0)
    try:
        return work(arguments, console)
    except (BadInput, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; nothing was left under a final name.", style="yellow")
        return 130


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields `progress(label, done, total)`; each label gets a bar with elapsed and remaining time."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield show


def gate_table(title: str, gates: Sequence[dict[str, Any]]) -> Table:
    """One row per check, one column per file: the measured value, and ✗ with the limit where it did not hold."""
    table = Table(title=title, title_justify="left")
    files = list(dict.fromkeys(gate["file"] for gate in gates))
    cells: dict[str, dict[str, str]] = {}
    for gate in gates:
        # What a file was held against (kld_vs_hf, kld_vs_f32) is said in fidelity.json.
        name = gate["name"].partition("_vs_")[0]
        cells.setdefault(name, {})[gate["file"]] = _cell(gate)
    table.add_column("check")
    for file in files:
        table.add_column(file, overflow="fold")
    for name, row in cells.items():
        failed = any("✗" in cell for cell in row.values())
        table.add_row(_LABELS.get(name, name), *(row.get(file, "") for file in files), style="red" if failed else None)
    return table


def merge_table(merge: dict[str, Any]) -> Table:
    """What every way of merging costs."""
    head, *rows = merge_rows(merge)
    table = Table(title="Merging the experts", title_justify="left")
    table.add_column(head[0])
    for column in head[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def failed_lines(gates: Sequence[dict[str, Any]]) -> list[str]:
    """What did not hold, one sentence each."""
    return [f"{gate['name']} ({gate['file']}): {gate['detail']}" for gate in gates if not gate["passed"]]


def _cell(gate: dict[str, Any]) -> str:
    value, limit = _text(gate["value"]), _text(gate["limit"])
    if not gate["passed"]:
        return f"{value} ✗ (limit {limit})"
    return value if gate["limit"] is None else f"{value} ✓"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
