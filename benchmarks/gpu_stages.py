"""Full SFT and the MUE stage of the Qwen3-1.7B shape on one GPU: tokens/s, MFU, memory against `plan`'s.

    python benchmarks/gpu_stages.py [--steps 4] [--json] [KEY=VALUE …]
    python benchmarks/gpu_stages.py attention=flash_attention_2

Random weights, the shipped recipe qwen3-1.7b and the trainers of `pediatricsgpt train`, its measurements included.
Each stage is trained with the recipe's settings, which are for 24 GB, and with those that a larger GPU has room for;
settings that do not fit by `plan` are not tried. KEY=VALUE changes the recipe for all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from sft_throughput import PASSAGES, build_data, print_table, write_base

from trainer.corpus.record import CorpusError
from trainer.origin import load_model, load_tokenizer, on_gpu
from trainer.plan import StagePlan, find_device, plan
from trainer.planning.flops import peak_flops
from trainer.planning.prepare import quieten_libraries
from trainer.recipe import Recipe, RecipeError, load_recipe
from trainer.stages.build import stage_trainer
from trainer.stages.checkpoints import read_metrics
from trainer.stages.fit import fit
from trainer.stages.view import View

STAGES = {"sft": "full SFT", "mue": "MUE"}
COLUMNS = ("stage", "settings", "tokens/s", "MFU", "peak GB", "plan's GB", "peak/plan", "note")
QWEN3_17B = {
    "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
DIALOGUES = 1000  # about 340 tokens each: ten optimiser steps of the recipe
# Settings of the stage beside the recipe's own. A pack on sdpa pays for attention over all of the micro-batch, so
# rows of like length in a batch stand beside packs.
SETTINGS: dict[str, tuple[str, ...]] = {
    "as shipped": (),
    "no recomputation": ("activation_checkpointing=false", "optimizer=adamw"),
    "no recomputation, 2 packs": (
        "activation_checkpointing=false", "optimizer=adamw", "batch_size=2", "gradient_accumulation=8",
    ),
    "no recomputation, rows grouped": (
        "activation_checkpointing=false", "optimizer=adamw", "packing=false", "batch_size=32",
        "gradient_accumulation=3",
    ),
}  # fmt: skip


def train(recipe: Recipe, name: str, planned: StagePlan, corpus: Path) -> dict[str, Any]:
    """Figures of one stage; the first half of the steps is warm-up. Peak memory and MFU are None without a GPU."""
    gpu = on_gpu(recipe)
    with tempfile.TemporaryDirectory() as folder:
        assert recipe.base is not None
        tokenizer = load_tokenizer(Path(recipe.base))
        model = load_model(recipe.base, recipe, tokenizer, recipe.stage(name))
        trainer = stage_trainer(name, model, tokenizer, recipe, corpus, Path(folder) / name)
        trainer.args.save_strategy = "no"
        metrics = Path(folder) / "metrics.jsonl"
        fitted, _ = fit(trainer, name, metrics, View(Console(quiet=True)), gpu)
        logged = [row["tokens_per_second"] for row in read_metrics(metrics) if "tokens_per_second" in row]
    speed, best = median(logged[len(logged) // 2 :]), peak_flops(torch.cuda.get_device_name()) if gpu else 0.0
    peak, allocated = fitted["peak_memory_bytes"], planned.memory["single"].allocated
    return {
        "tokens_per_second": speed,
        "mfu": speed * planned.flops_per_token / best if best else None,
        "peak_bytes": peak,
        "planned_bytes": allocated,
        "peak_over_plan": peak / allocated if peak else None,
    }


def measure(recipe: Recipe, name: str, corpus: Path) -> dict[str, Any]:
    """`train`'s figures, or a "note" why there are none."""
    planned = plan(recipe, corpus, probe=False).stages[name]
    memory, device = planned.memory["single"], find_device(recipe, None)
    if not memory.fits(device.bytes):
        return {"planned_bytes": memory.allocated, "note": f"does not fit into {device.name}"}
    try:
        return train(recipe, name, planned, corpus)
    except torch.OutOfMemoryError:
        return {"planned_bytes": memory.allocated, "note": "out of memory, although planned to fit"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def run(
    device: str = "cuda",
    steps: int = 4,
    overrides: Sequence[str] = (),
    shape: dict[str, int] | None = None,
    dialogues: int = DIALOGUES,
    settings: Sequence[str] = tuple(SETTINGS),
) -> dict[str, Any]:
    """Measures every stage of `STAGES` with every one of `settings`, `steps` optimiser steps each after as many.

    `shape` replaces that of Qwen3-1.7B, so that a processor can run all of this.
    Returns {"device", "steps", "stages": {stage: {settings: figures}}}. Raises RecipeError, CorpusError.
    """
    quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        folders, tokenizer = build_data(work, 1, dialogues)
        base, corpus = work / "base", folders[PASSAGES]
        write_base(base, shape or QWEN3_17B, tokenizer, device)
        found: dict[str, dict[str, Any]] = {}
        for name in STAGES:
            found[name] = {}
            for setting in settings:
                length = (f"max_steps={2 * steps}", f"log_every={max(1, steps // 2)}", "evaluate_every=0")
                changed = [f"stages.{name}.{key}" for key in (*SETTINGS[setting], *length)]
                origin = [f"base={base}", f"device={device}", "loggers=[]"]
                recipe = load_recipe(Path("qwen3-1.7b"), [*origin, *changed, *overrides])
                found[name][setting] = measure(recipe, name, corpus)
    return {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "steps": steps, "stages": found}


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of `run`'s figures, one row per stage and settings; the columns are `COLUMNS`."""

    def cell(figure: dict[str, Any], key: str, form: str, unit: float = 1.0) -> str:
        value = figure.get(key)
        return "–" if value is None else format(value / unit, form)

    return [
        (
            STAGES[name],
            setting,
            cell(figure, "tokens_per_second", ",.0f"),
            cell(figure, "mfu", ".1%"),
            cell(figure, "peak_bytes", ".1f", 1e9),
            cell(figure, "planned_bytes", ".1f", 1e9),
            cell(figure, "peak_over_plan", ".2f"),
            figure.get("note", ""),
        )
        for name, found in figures["stages"].items()
        for setting, figure in found.items()
    ]


def main() -> int:
    """Prints the table, or one JSON object; exit code 2 when there is no GPU or a setting is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps that are timed, after as many others")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        print("gpu_stages: torch sees no NVIDIA GPU here; `nvidia-smi` shows whether there is one.", file=sys.stderr)
        return 2
    try:
        figures = run(steps=arguments.steps, overrides=arguments.overrides)
    except (RecipeError, CorpusError, ImportError) as error:
        print(f"gpu_stages: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(figures, ensure_ascii=False, indent=1))
        return 0
    print(figures["device"])
    print_table([COLUMNS, *rows(figures)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
