"""`pediatricsgpt plan`: what a recipe will cost, before anything is trained."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.commands.shared import add_recipe, command_parser, default_corpus, fail, work_offline
from trainer.corpus.record import CorpusError
from trainer.recipe import RecipeError, load_recipe

if TYPE_CHECKING:
    from trainer.plan import Plan, StagePlan

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "copies": "bf16",
    "activations": "activations",
    "loss": "loss",
    "gathered": "gathered",
    "reference": "reference",
    "context": "context",
}


def main(argv: list[str]) -> int:
    """Prints the plan of a recipe; exit code 1 when no strategy fits or the disk is too small."""
    parser = command_parser(
        "plan",
        "Parameters, tokens, steps, memory per GPU, disk and time of a recipe. No weights are loaded. The corpus is\n"
        "built first if it is made from cards and not there. Exit code 1: it does not fit (and what would help).",
        "examples:\n"
        "  pediatricsgpt plan demo\n"
        "  pediatricsgpt plan qwen3-4b --gpu-memory 24\n"
        "  pediatricsgpt plan qwen3-8b --processes 8 --gpu-memory 80\n"
        "  pediatricsgpt plan my.yaml stages.sft.batch_size=2 --probe",
    )
    add_recipe(parser)
    parser.add_argument("--corpus", type=Path, help="corpus folder (default: PedCorpus/NAME)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="GPUs, one process each (default: 1)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="memory of one GPU (default: of the GPU here, else 24)"
    )
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="train random weights for ten seconds (longer if steps are) to tell the time; default: if there is a GPU",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.processes < 1 or (arguments.gpu_memory is not None and arguments.gpu_memory <= 0):
        parser.error("--processes and --gpu-memory must be above 0")
    work_offline()
    console = Console(stderr=True)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        with console.status("loading the training libraries") as status:
            from trainer import plan as planner
            from trainer.planning.prepare import prepared_corpus, quieten_libraries

            quieten_libraries()
            status.update("building the corpus")
            with prepared_corpus(recipe, arguments.corpus or default_corpus(recipe)) as corpus:
                plan = planner.plan(
                    recipe, corpus, arguments.processes, arguments.gpu_memory, arguments.probe, status.update
                )
    except (RecipeError, CorpusError, OSError) as error:
        return fail(error)
    if arguments.json:
        print(json.dumps(as_json(plan), ensure_ascii=False))
    else:
        print_plan(plan, Console())
    return 0 if plan.fits else 1


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, with the sums and verdicts."""
    data = asdict(plan)
    for name, stage in plan.stages.items():
        data["stages"][name]["memory"] = {
            strategy: {**memory.parts, "moment": memory.moment, "total": memory.total, "fits": plan.fits_in(memory)}
            for strategy, memory in stage.memory.items()
        }
    for step, fields in zip(plan.advice, data["advice"], strict=True):
        fields |= {"overrides": step.overrides, "memory": step.memory.total}
    return data | {
        "non_embedding": plan.parameters - plan.embeddings,
        "disk_bytes": plan.disk_bytes,
        "fitting": plan.fitting,
        "fits": plan.fits,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Tables for the terminal."""
    gpus = f"{plan.processes} × " if plan.processes > 1 else ""
    console.print(
        f"[bold]{plan.recipe}[/]: {_count(plan.parameters)} parameters, of them {_count(plan.embeddings)} in the "
        f"embedding; for {gpus}{plan.device.name} ({_size(plan.device.bytes)})",
        highlight=False,
    )
    console.print(_stages(plan))
    for name, stage in plan.stages.items():
        for note in _notes(name, stage):
            console.print(f"  {name}: {note}", style="dim", highlight=False, soft_wrap=True)
    memory = _memory(plan)
    wide = console.measure(memory, options=console.options.update(max_width=500)).maximum > console.width
    console.print(_memory(plan, parts=False) if wide else memory)
    _print_verdict(plan, console)
    if any(stage.speed or stage.not_probed for stage in plan.stages.values()):
        console.print(_time(plan))


def _stages(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("stage", "trains", "records", "tokens", "scored", "rows", "padding", "steps"):
        table.add_column(column, justify="left" if column in ("stage", "trains") else "right", no_wrap=True)
    for name, stage in plan.stages.items():
        tokens, trained = stage.tokens, f"{stage.method} {_count(stage.trainable)}"
        if stage.trainable < stage.parameters:
            trained += f" ({100 * stage.trainable / stage.parameters:.2g} %)"
        rows = f"{tokens.packs:,} packs" if tokens.packs is not None else f"{tokens.rows:,}"
        figures = (f"{tokens.records:,}", _count(tokens.tokens), _count(tokens.scored), rows, f"{tokens.padding:.1%}")
        table.add_row(name, trained, *figures, f"{tokens.steps:,}")
    return table


def _notes(name: str, stage: StagePlan) -> list[str]:
    tokens, notes = stage.tokens, []
    if tokens.sampled < tokens.records:
        notes.append(f"{tokens.sampled:,} of {tokens.records:,} records were tokenized, the figures are scaled up")
    if tokens.dropped_tokens:
        lost = tokens.dropped_tokens / (tokens.tokens + tokens.dropped_tokens)
        notes.append(
            f"{_count(tokens.dropped_tokens)} tokens ({lost:.1%}) lie behind max_length and are lost; raise "
            f"stages.{name}.max_length"
        )
    if tokens.dropped_rows:
        notes.append(f"{tokens.dropped_rows:,} sequences are left out: max_length ends before their answer begins")
    if tokens.packs is not None:
        notes.append(f"{tokens.empty:.1%} of the packs' room stays free")
        if stage.mask > 2**30:
            notes.append(
                f"a batch of packs is one long row: its attention masks take {_size(stage.mask)}. batch_size=1 with "
                "more gradient_accumulation makes them smaller, attention=flash_attention_2 needs none"
            )
    return notes


def _memory(plan: Plan, parts: bool = True) -> Table:
    memories = [memory for stage in plan.stages.values() for memory in stage.memory.values()]
    scale, unit = (2**30, "GiB") if max(memory.total for memory in memories) >= 4 * 2**30 else (2**20, "MiB")
    digits = 1 if unit == "GiB" else 0
    where = "one GPU" if plan.device.gpu else "one process"
    title = f"memory of {where} at the fullest moment of a step, in {unit}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    shown = [part for part in PARTS if parts and any(memory.parts[part] for memory in memories)]
    for column in ("stage", "strategy", *(PARTS[part] for part in shown), "total", "fits"):
        table.add_column(column, justify="left" if column in ("stage", "strategy", "fits") else "right", no_wrap=True)
    for name, stage in plan.stages.items():
        for strategy, memory in stage.memory.items():
            figures = [*(memory.parts[part] for part in shown), memory.total]
            written = (f"{figure / scale:.{digits}f}" for figure in figures)
            table.add_row(name, strategy, *written, _mark(plan.fits_in(memory)))
    return table


def _print_verdict(plan: Plan, console: Console) -> None:
    if plan.fitting:
        console.print(f"{_mark(True)} every stage fits ({', '.join(plan.fitting)})", highlight=False)
    else:
        console.print(f"{_mark(False)} it does not fit. In this order, each on top of the ones before it:")
    for step in plan.advice:
        change = " ".join(step.overrides) or (
            f"or {step.stage} on {step.processes} GPUs: accelerate launch with FSDP2, and the batch_size, "
            "activation_checkpointing above (the 8-bit optimizers cannot be sharded)"
        )
        console.print(f"  {_mark(step.fits)} {_size(step.memory.total):>9}  {change}", highlight=False, soft_wrap=True)
    if plan.overrides:
        console.print(f"together: {' '.join(plan.overrides)}", style="bold", highlight=False, soft_wrap=True)
    room, free = plan.disk_bytes, plan.disk_free
    console.print(
        f"{_mark(room <= free)} disk: {_size(room)} for the run folder, {_size(plan.disk.checkpoints)} of it for "
        f"checkpoints while a stage runs; {_size(free)} are free here",
        highlight=False,
        soft_wrap=True,
    )


def _time(plan: Plan) -> Table:
    speeds = [stage.speed for stage in plan.stages.values() if stage.speed]
    where = f" on {speeds[0].device}" if speeds else ""
    table = Table(
        title=f"time, from a probe{where}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("stage", "tokens/s", "MFU", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, stage in plan.stages.items():
        if stage.speed is None:
            table.add_row(name, stage.not_probed)
            continue
        mfu = f"{stage.speed.mfu:.0%}" if stage.speed.mfu else "–"
        table.add_row(name, f"{stage.speed.tokens_per_second:,.0f}", mfu, _duration(stage.speed.hours))
    if len(speeds) == len(plan.stages):
        table.add_row("all", "", "", _duration(sum(speed.hours for speed in speeds)), style="bold")
    return table


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours > 1 / 60 else f"{3600 * hours:.0f} s"


def _mark(held: bool) -> str:
    return "[green]✓[/]" if held else "[red]✗[/]"


def _size(number: float) -> str:
    """Bytes in GiB, or MiB below one."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _count(number: float) -> str:
    """A count with three digits and a unit."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:g}"
