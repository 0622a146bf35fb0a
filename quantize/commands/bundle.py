"""`pediatricsgpt bundle`: app, model and installer in one folder, for a computer without a network."""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path

from platformdirs import user_cache_path
from rich.console import Console
from rich.table import Table

from quantize.bundle import contents, write
from quantize.bundle.installer import machine
from quantize.bundle.platforms import PLATFORMS
from quantize.commands.shared import command_parser, guarded, progress_bars

_EPILOG = """\
examples:
  pediatricsgpt bundle dist/demo --out /media/STICK/pediatricsgpt
      for machines like this one: then `sh install.sh` there; the first time llama.cpp is built, 3 to 10 minutes
  pediatricsgpt bundle dist/qwen3-1.7b --quant Q4_K_M --python 3.11 --python 3.12 --python 3.13 --out stick
      one stick for Debian 12, Ubuntu 24.04 and Debian 13
  pediatricsgpt bundle dist/demo --platform windows-x86_64 --wheels wheels --out stick
      wheels/ holds a llama-cpp-python wheel built on Windows; without it the command to build one is printed
  pediatricsgpt bundle dist/demo --only model --out stick
      an update that carries only a new model (or --only app)
  pediatricsgpt bundle dist/demo --out stick --dry-run
      every file with its size; fills the cache of wheels, writes nothing to the stick

A stopped command continues where it was. Python itself (3.11 or newer) is not in the bundle: the target must have it.
exit codes: 0 done, 2 wrong use or bad input, 130 Ctrl-C
"""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return guarded(_run, _parser(), argv)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    options = contents.Options(
        source=arguments.source,
        platform=arguments.platform,
        pythons=tuple(sorted(set(arguments.python or ["3.11"]), key=lambda p: int(p.split(".")[1]))),
        cache=arguments.cache,
        wheels=arguments.wheels,
        quant=arguments.quant,
        only=arguments.only,
        native=arguments.native,
        large_files=arguments.large_files,
    )
    write.refuse_foreign(arguments.out)  # before llama.cpp is built for minutes
    with tempfile.TemporaryDirectory() as work, progress_bars(console) as progress:
        found = contents.collect(options, Path(work), progress)
        items = write.finished(found) if arguments.dry_run else write.write(found, arguments.out, progress)
    if arguments.json:
        files = [{"name": i.name, "bytes": i.bytes, "sha256": i.sha256} for i in items]
        facts = {**found.facts, "bytes": sum(i.bytes for i in items), "files": files, "notes": found.notes}
        print(json.dumps({**facts, "output": None if arguments.dry_run else str(arguments.out)}, ensure_ascii=False))
        return 0
    _show(items, found, arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "bundle", "Pack app, model and installer into one folder that installs without a network.", _EPILOG
    )
    parser.add_argument(
        "source", nargs="?", type=Path, metavar="DIST", help="distribution folder (dist/NAME) or a .gguf file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="an empty folder, best on the stick")
    here = machine()
    parser.add_argument(
        "--platform", choices=PLATFORMS, default=here if here in PLATFORMS else None, required=here not in PLATFORMS,
        help=f"the machines it is for: {', '.join(PLATFORMS)} (default: this one's)", metavar="NAME",
    )  # fmt: skip
    parser.add_argument(
        "--python", action="append", type=_python, metavar="3.N",
        help="Python on those machines, repeatable (default: 3.11)",
    )  # fmt: skip
    parser.add_argument("--quant", metavar="TYPE", help="which model of DIST, when it holds several")
    parser.add_argument("--only", choices=("app", "model"), help="an update with one of the two")
    parser.add_argument(
        "--wheels", type=_folder, metavar="FOLDER", help="take the llama-cpp-python wheel (and others) from here"
    )
    parser.add_argument(
        "--native", action="store_true", help="accept a llama-cpp-python wheel that needs a processor like this one"
    )
    parser.add_argument(
        "--large-files", action="store_true", help="the stick is exFAT: files of 4 GiB and more are fine"
    )
    parser.add_argument(
        "--cache", type=Path, default=user_cache_path("pediatricsgpt") / "bundle", metavar="FOLDER",
        help="where built and downloaded wheels are kept (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="list the files and their sizes; write only to the cache"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    return parser


def _python(text: str) -> str:
    if not re.fullmatch(r"3\.(1[1-9]|[2-9]\d)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no Python version from 3.11, like 3.12")
    return text


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text)


def _show(items: tuple[contents.Item, ...], found: contents.Contents, arguments: argparse.Namespace) -> None:
    console = Console()
    if arguments.dry_run:
        table = Table("file", "MiB", box=None)
        for entry in items:
            table.add_row(entry.name, f"{entry.bytes / 2**20:.2f}")
        console.print(table)
    size = sum(entry.bytes for entry in items)
    where = "would be written" if arguments.dry_run else f"in {arguments.out}"
    console.print(f"{len(items)} files, {size / 2**20:.1f} MiB, {where}", highlight=False, soft_wrap=True)
    needs = found.facts["requires"]
    parts = [", ".join(needs["cpu"]), f"glibc {needs['glibc']}" if needs["glibc"] else "", *needs["libraries"]]
    python = " / ".join(found.facts["python"])
    wanted = "; ".join(part for part in (python and f"Python {python}", *parts) if part)
    if wanted:
        console.print(f"The target needs: {wanted}", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    if not arguments.dry_run:
        script = "install.bat" if found.facts["platform"].startswith("windows-") else "sh install.sh"
        console.print(f"There: {script}", highlight=False)
