"""How fast training is, as ratios and in one go: the MUE layer, SFT throughput and, on a GPU, whole stages.

    python benchmarks/training.py [--device cpu|cuda] [--threads 1] [--quick] [--json]

Each part is a script of its own with more options: mue_layer.py, sft_throughput.py, gpu_stages.py. The exit code is
1 when a goal is missed. `--quick` shows that all runs, on sizes too small to be held to goals.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import gpu_stages
import mue_layer
import sft_throughput
import torch
from sft_throughput import OURS, print_table

from trainer.corpus.record import CorpusError
from trainer.recipe import RecipeError

COLUMNS = ("figure", "of", "measured", "goal", "")


@dataclass(frozen=True)
class Goal:
    """A measured ratio and what it must be: at least or at most `limit`."""

    figure: str
    of: str
    measured: float
    limit: float
    at_least: bool = True
    unit: str = "×"

    @property
    def held(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def row(self) -> tuple[str, ...]:
        """The goal as a row of the table; the columns are `COLUMNS`."""
        measured, limit = (f"{value:,.3g}{self.unit}" for value in (self.measured, self.limit))
        sign = "≥" if self.at_least else "≤"
        return self.figure, self.of, measured, f"{sign} {limit}", "held" if self.held else "missed"


def layer_goals(figures: dict[str, Any]) -> list[Goal]:
    """Of `mue_layer.run`. On the processor the published step is only held against in the gate/up shape."""
    gpu = figures["device"] != "cpu"
    goals = []
    for shape, layers in figures["shapes"].items():
        mue, of = layers["MUE"], f"MUE layer, {shape}"
        if gpu or shape == "gate/up":
            goals.append(Goal("speed over the published", of, mue["speedup_over_published"], 3.0 if gpu else 1.5))
        goals.append(Goal("activations saved, times less", of, mue["saved_less_than_published"], 100.0))
        goals.append(Goal("time over LoRA of equal rank", of, mue["time_over_lora"], 1.15, at_least=False))
    return goals


def sft_goals(figures: dict[str, Any]) -> list[Goal]:
    """Of `sft_throughput.run`."""
    return [
        Goal("useful tokens/s over TRL's defaults", f"SFT, {kind}", found["variants"][OURS]["over_trl"], 2.0)
        for kind, found in figures["dialogues"].items()
    ]


def gpu_goals(figures: dict[str, Any]) -> list[Goal]:
    """Of `gpu_stages.run`: the best utilisation of full SFT, and memory against the plan wherever it was measured."""
    used = [figure["mfu"] for figure in figures["stages"]["sft"].values() if figure.get("mfu")]
    goals = [Goal("MFU", "full SFT, best settings", 100 * max(used), 45.0, unit=" %")] if used else []
    for name, settings in figures["stages"].items():
        for setting, figure in settings.items():
            if ratio := figure.get("peak_over_plan"):
                of = f"{gpu_stages.STAGES[name]}, {setting}"
                goals.append(Goal("memory off the plan", of, 100 * abs(ratio - 1), 15.0, at_least=False, unit=" %"))
    return goals


def run(device: str, quick: bool) -> dict[str, Any]:
    """Figures of all parts and their goals. Raises RecipeError, CorpusError, ImportError."""
    if quick:
        layer = mue_layer.run(device, tokens=128, rounds=3)
        sft = sft_throughput.run(device, short=24, passages=16, rounds=1)
    else:
        layer = mue_layer.run(device, rounds=5)
        sft = sft_throughput.run(device)
    parts = {"mue_layer": layer, "sft_throughput": sft}
    goals = [*layer_goals(layer), *sft_goals(sft)]
    if device == "cuda":
        parts["gpu_stages"] = gpu_stages.run(steps=2 if quick else 4)
        goals += gpu_goals(parts["gpu_stages"])
    return {**parts, "goals": [asdict(goal) | {"held": goal.held} for goal in goals]}


def main() -> int:
    """Prints the tables and the goals, or one JSON object; exit code 1 when a goal is missed, 2 for bad settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of the processor (default: torch's; 1 beside other load)")
    parser.add_argument("--quick", action="store_true", help="small sizes, within a minute")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("training: torch sees no NVIDIA GPU here; measure with --device cpu.", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    try:
        figures = run(arguments.device, arguments.quick)
    except (RecipeError, CorpusError, ImportError, torch.OutOfMemoryError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    goals = [Goal(**{key: value for key, value in goal.items() if key != "held"}) for goal in figures["goals"]]
    if arguments.json:
        print(json.dumps(figures, ensure_ascii=False, indent=1))
    else:
        _print(figures, goals, time.monotonic() - started)
    return 0 if arguments.quick or all(goal.held for goal in goals) else 1


def _print(figures: dict[str, Any], goals: list[Goal], seconds: float) -> None:
    layer, sft = figures["mue_layer"], figures["sft_throughput"]
    print(
        f"{layer['device']}, {layer['threads']} threads, load {layer['load'][0]:.1f} to {sft['load'][1]:.1f}, "
        f"{seconds:.0f} s\n\nMUE layer, {layer['dtype']}, {layer['tokens']} tokens, {layer['rounds']} rounds"
    )
    print_table([mue_layer.COLUMNS, *mue_layer.rows(layer)])
    print(f"\nSFT, {sft['parameters']:,} parameters, {sft['rounds']} rounds")
    print_table([sft_throughput.COLUMNS, *sft_throughput.rows(sft)])
    if "gpu_stages" in figures:
        print("\nStages of the Qwen3-1.7B shape")
        print_table([gpu_stages.COLUMNS, *gpu_stages.rows(figures["gpu_stages"])])
    print()
    print_table([COLUMNS, *(goal.row() for goal in goals)])


if __name__ == "__main__":
    sys.exit(main())
