"""`pediatricsgpt verify`: is this GGUF what it should be?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quantize.commands.shared import command_parser, gate_table, guarded, progress_bars

_EPILOG = """\
examples:
  pediatricsgpt verify dist/demo/demo-Q8_0.gguf
      the file by itself: header, checksum, vocabulary, chat template, end of answer, a few answers
  pediatricsgpt verify dist/demo/demo-Q8_0.gguf --level quick
      the same without loading the weights; seconds for any size
  pediatricsgpt verify model-Q4_K_M.gguf --against Qwen3-1.7B
      token by token, weight by weight and logit by logit against the checkpoint it was made of
  pediatricsgpt verify model-Q4_K_M.gguf --reference model-BF16.gguf --output fidelity.json
      how far a quantized file is from the unquantized one; the report also goes to a file

levels:
  quick   header, checksum, token ids, chat template, end of answer; no weights
  file    also the weights, greedy answers, and with --reference the distance of the logits; no torch
  full    also the logits of Hugging Face; needs --against, torch, and memory for the model in float32

exit codes: 0 every check held, 1 a check failed, 2 wrong use, or a file that is no usable GGUF
"""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return guarded(_run, _parser(), argv)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from quantize.errors import BadInput
    from quantize.verify import Options, verify

    if arguments.level == "full" and arguments.against is None:
        raise BadInput("--level full compares with Hugging Face; name the checkpoint folder with --against.")
    options = Options(arguments.file, arguments.against, arguments.reference, arguments.level)
    with progress_bars(console) as progress:
        report = verify(options, progress)
    text = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(text)
    else:
        _show(report)
    return 0 if report["passed"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "verify", "Check a GGUF file: by itself, against its Hugging Face source, or against another file.", _EPILOG
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the GGUF file")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the Hugging Face checkpoint it was made of")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="another GGUF of the same model, less quantized")
    parser.add_argument("--level", choices=("quick", "file", "full"), help="how much (default: as much as possible)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the report here as JSON")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on standard output")
    return parser


def _show(report: dict[str, Any]) -> None:
    console = Console()
    console.print(gate_table(f"{report['name']}: checks (level {report['level']})", report["gates"]))
    if report["answers"]:
        console.print(_answers(report["answers"]))
    if report["claims"]:
        console.print(f"The file says of itself: {json.dumps(report['claims'])}", highlight=False, markup=False)
    if report["passed"]:
        console.print("Every check held.", style="green")
    else:
        console.print(f"Failed: {', '.join(report['failed'])}.", style="red", highlight=False, markup=False)


def _answers(answers: list[dict[str, Any]]) -> Table:
    """Greedy answers side by side."""
    table = Table(title="greedy answers", title_justify="left")
    other = answers[0].get("against")
    for column in ("question", "this file", *([other] if other else []), "the same for", "ends"):
        table.add_column(column, overflow="fold")
    for answer in answers:
        common = f"{answer['common_tokens']} of {answer['tokens']} tokens" if other else "–"
        theirs = [_plain(answer["its_answer"])] if other else []
        stop = "by itself" if answer["stop"] == "end" else "cut off"
        table.add_row(_plain(answer["question"]), _plain(answer["answer"]), *theirs, common, stop)
    return table


def _plain(text: str) -> str:
    """Safe to print, whatever a model says: no control characters, no markup."""
    return "".join(letter if letter.isprintable() else " " for letter in text).replace("[", r"\[")
