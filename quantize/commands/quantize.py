"""`pediatricsgpt quantize`: one command from a run or a checkpoint to verified GGUF files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from quantize.commands.shared import command_parser, failed_lines, gate_table, guarded, merge_table, progress_bars
from quantize.merging import METHODS, merge_sentence
from quantize.run_folder import NAME

QUANTS = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "IQ3_XXS",
    "BF16", "F16", "F32",
)  # fmt: skip
LEVELS = ("full", "file", "quick")

_EPILOG = """\
examples:
  pediatricsgpt quantize runs/demo
      dist/demo/demo-Q8_0.gguf with manifest, checksums, model card and fidelity report
  pediatricsgpt quantize runs/NAME --quant Q4_K_M --quant Q8_0 --task-adapters
      two files from one conversion, and one small adapter per consultation task
  pediatricsgpt quantize Qwen3-1.7B --quant Q4_K_M
      any Hugging Face checkpoint: Qwen3, Qwen2/2.5, Llama, Baichuan and Baichuan2
  pediatricsgpt quantize Baichuan2-13B --adapter MoE-Adapter --merge uniform --quant Q4_K_M
      a checkpoint and an adapter in the layout of the paper's released code
  pediatricsgpt quantize Qwen3-4B --quant Q4_K_M --dry-run
      sizes (to the byte, with merged experts to some hundred), disk needed, which laptop can run it; writes nothing

Which type: Q8_0 loses next to nothing; Q4_K_M is half its size and right for 0.6B and more on a 4 GB laptop.

What is checked before a file gets its name (--check):
  full    against the model as Hugging Face runs it (needs torch and memory for it in float32), then as `file`
  file    weights and logits against the unquantized file through llama.cpp, then as `quick`
  quick   header, token ids, chat template, end of generation
`file` and `quick` do without torch where nothing else needs it: merging experts on dialogues, an importance matrix
and weights in pytorch_model.bin do.

exit codes: 0 every check held, 1 a check failed (see fidelity.json), 2 wrong use or bad input
"""


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return guarded(_run, _parser(), argv)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from quantize import export

    options = export.Options(
        source=arguments.source,
        quants=tuple(dict.fromkeys(arguments.quant or ["Q8_0"])),
        adapter=arguments.adapter,
        calibration=arguments.calibration,
        merge=arguments.merge,
        rank=arguments.rank,
        task_adapters=arguments.task_adapters,
        save_lora=arguments.save_lora,
        imatrix=arguments.imatrix,
        tensor_types=dict(arguments.tensor_type or []),
        check=arguments.check,
        output=arguments.output,
        name=arguments.name,
        force=arguments.force,
    )
    if arguments.dry_run:
        return _dry_run(options, arguments.json)
    with progress_bars(console) as progress:
        result = export.export(options, progress)
    if arguments.json:
        print(json.dumps({**result.report, "output": str(result.folder)}, ensure_ascii=False))
    else:
        _show(result.report, result.folder, result.report_file)
    return 0 if result.report["passed"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "quantize",
        "Merge the experts, write the model as GGUF, check it against the source, and pack it: one command.",
        _EPILOG,
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="run folder (runs/NAME) or a Hugging Face checkpoint folder"
    )
    parser.add_argument(
        "--quant", action="append", choices=QUANTS, metavar="TYPE",
        help=f"type of the weights; repeatable; {', '.join(QUANTS)} (default: Q8_0)",
    )  # fmt: skip
    merging = parser.add_argument_group("merging")
    merging.add_argument(
        "--adapter", type=Path, metavar="FOLDER",
        help="MUE or LoRA adapter for a checkpoint folder; the paper's released layout is recognised",
    )  # fmt: skip
    merging.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="dialogues to merge on, one JSON object a line (default: the run's calibration.jsonl)",
    )  # fmt: skip
    merging.add_argument(
        "--merge", choices=METHODS,
        help="what stands for the gates, which change from token to token: the weights that reproduce the live "
        "experts best on the calibration dialogues (least-squares, the default where there are dialogues), the gates' "
        "mean (usage), 1/N (uniform, the default without dialogues), or only the universal expert (universal)",
    )  # fmt: skip
    merging.add_argument("--rank", type=_positive, metavar="K", help="reduce the merged experts to this rank per layer")
    merging.add_argument(
        "--task-adapters", action="store_true", help="also write adapters/TASK.gguf, one per consultation task"
    )
    merging.add_argument(
        "--save-lora", type=Path, metavar="FOLDER", help="also save the merged experts as an ordinary PEFT LoRA"
    )
    quantizing = parser.add_argument_group("quantizing")
    quantizing.add_argument(
        "--imatrix", choices=("auto", "on", "off"),
        help="importance of each input column, from paediatric text, for K- and IQ-types: auto makes the file with and "
        "without and keeps the closer one (--check quick measures neither: there it is on); on trusts it "
        "(default: auto with --check full, else off)",
    )  # fmt: skip
    quantizing.add_argument(
        "--tensor-type", action="append", type=_override, metavar="PATTERN=TYPE",
        help="another type for the tensors whose name matches a regular expression, e.g. 'ffn_down=Q6_K'; repeatable",
    )  # fmt: skip
    quantizing.add_argument("--check", choices=LEVELS, default="full", help="see below (default: full)")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, help="distribution folder (default: dist/NAME)")
    output.add_argument("--name", type=_name, help="name of the model and its files (default: the source's name)")
    output.add_argument("--dry-run", action="store_true", help="sizes and fit only; nothing is written")
    output.add_argument("--json", action="store_true", help="print the report as one JSON object on standard output")
    output.add_argument(
        "--force", action="store_true", help="replace an export that is already there, once all checks hold"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("use a whole number from 1")
    return int(text)


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("use up to 64 letters, digits, '.', '_' or '-'")
    return text


def _override(text: str) -> tuple[str, str]:
    pattern, separator, kind = text.rpartition("=")
    if not separator or not pattern or not kind:
        raise argparse.ArgumentTypeError("write PATTERN=TYPE, for instance 'ffn_down=Q6_K'")
    return pattern, kind


def _dry_run(options: Any, as_json: bool) -> int:
    from quantize.forecast import forecast

    found = forecast(options)
    if as_json:
        print(json.dumps(found.record(), ensure_ascii=False))
    else:
        Console().print(found.table())
    return 0


def _show(report: dict[str, Any], folder: Path, report_file: Path) -> None:
    console = Console()
    of_files = [gate for gate in report["gates"] if gate["file"] != "merge"]  # merging has a table of its own
    console.print(gate_table(f"{report['name']}: checks ({report['check']})", of_files))
    if report["merge"] is not None:
        console.print(merge_table(report["merge"]))
        console.print(merge_sentence(report["merge"]), highlight=False)
    if report["imatrix"] is not None:
        for line in _importance_lines(report["imatrix"]):
            console.print(line, highlight=False)
    if report["passed"]:
        for name, size in report["bytes"].items():
            console.print(f"{folder / name}  {size / 2**20:.1f} MiB", highlight=False, soft_wrap=True)
        return
    for line in failed_lines(report["gates"]):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Failed: {', '.join(report['failed'])}. No model file was kept; the report is {report_file}.",
        style="red", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _importance_lines(imatrix: dict[str, Any]) -> list[str]:
    lines = []
    for quant, found in imatrix["mean_kld"].items():
        if found["with"] is None:
            lines.append(f"{quant} was made with an importance matrix ({imatrix['tokens']} tokens).")
            continue
        choice = "the matrix was used" if found["used"] else "the file without was kept"
        lines.append(
            f"{quant}: mean KL divergence {found['with']:.4g} with an importance matrix ({imatrix['tokens']} tokens), "
            f"{found['without']:.4g} without; {choice}."
        )
    return lines
