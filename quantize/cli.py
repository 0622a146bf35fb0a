"""`pediatricsgpt quantize`: one command from a run folder to a verified GGUF."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from quantize.errors import BadInput
from quantize.run_folder import NAME

QUANTS = ("Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q4_0", "IQ4_XS", "F16", "BF16", "F32")
MERGES = ("usage", "uniform", "universal")

_EPILOG = """\
examples:
  pediatricsgpt quantize runs/demo
      dist/demo/demo-Q8_0.gguf with manifest, checksums, model card and fidelity report
  pediatricsgpt quantize runs/demo --quant Q4_K_M --quant Q8_0
      two files, made and checked in one go
  pediatricsgpt quantize runs/demo --merge uniform --output dist/uniform --json
      a baseline of merging; the figures as one JSON object on standard output

Which type: Q8_0 loses next to nothing; Q4_K_M is half its size and right for 0.6B and more on a 4 GB laptop.
Nothing gets its final name before it was opened again by llama.cpp and compared with the source.
exit codes: 0 every check held, 1 a check failed (see fidelity.json), 2 wrong use or bad input
"""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    console = Console(stderr=True)
    try:
        arguments = _parse(argv)
    except SystemExit as error:
        return int(error.code or 0)
    from quantize import export

    options = export.Options(
        run=arguments.run,
        quants=tuple(dict.fromkeys(arguments.quant or ["Q8_0"])),
        merge=arguments.merge,
        output=arguments.output,
        name=arguments.name,
        force=arguments.force,
    )
    try:
        with _progress(console) as progress:
            result = export.export(options, progress)
    except (BadInput, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("Stopped; nothing was left under a final name.", style="yellow")
        return 130
    if arguments.json:
        print(json.dumps({**result.report, "output": str(result.folder)}, ensure_ascii=False))
    else:
        _show(result.report, result.folder, result.report_file)
    return 0 if result.report["passed"] else 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {"quantize": main}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pediatricsgpt quantize",
        description="Merge the experts of a finished run, write it as GGUF, check it against the source, and pack it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder made by `pediatricsgpt train` (runs/NAME)")
    parser.add_argument(
        "--quant", action="append", choices=QUANTS, help="type of the weights; repeatable (default: Q8_0)"
    )
    parser.add_argument(
        "--merge", choices=MERGES, default="usage",
        help="what stands for the token-dependent gates: their mean on the calibration dialogues (usage, the default), "
        "1/N (uniform), or only the universal expert (universal)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="distribution folder (default: dist/NAME)")
    parser.add_argument("--name", type=_name, help="name of the model and its files (default: the run's name)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on standard output")
    parser.add_argument(
        "--force", action="store_true", help="replace an export that is already there, once all checks hold"
    )
    return parser.parse_args(argv)


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("use up to 64 letters, digits, '.', '_' or '-'")
    return text


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield show


def _show(report: dict[str, Any], folder: Path, report_file: Path) -> None:
    from quantize.merging import merge_sentence

    console = Console()
    table = Table(title=f"{report['name']}: checks", title_justify="left")
    for column in ("check", "file", "value", "limit", "", "detail"):
        table.add_column(column, overflow="fold")
    for gate in report["gates"]:
        mark = "reported" if gate["limit"] is None else "ok" if gate["passed"] else "FAILED"
        style = "red" if mark == "FAILED" else None
        table.add_row(
            gate["name"],
            gate["file"],
            _cell(gate["value"]),
            _cell(gate["limit"]),
            mark,
            gate["detail"],
            style=style,
        )
    console.print(table)
    console.print(merge_sentence(report["merge"]), highlight=False)
    if report["passed"]:
        for name, size in report["bytes"].items():
            console.print(f"{folder / name}  {size / 2**20:.1f} MiB", highlight=False, soft_wrap=True)
    else:
        console.print(
            f"Failed: {', '.join(report['failed'])}. No model file was kept; the report is {report_file}.",
            style="red", highlight=False, soft_wrap=True,
        )  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
