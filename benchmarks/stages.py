"""What each stage of training does, on real records: several seeds, mean ± standard deviation.

    python benchmarks/stages.py --data FOLDER [--seeds 1 2 3] [--jobs 2] [--work runs/study] [--json]
    python benchmarks/stages.py --data FOLDER --recipe demo stages.dfpo.evaluate_every=20 stages.mue.evaluate_every=0

FOLDER holds the upstream files that real_records.py names. Each seed is one `pediatricsgpt train` on one thread, then
plain LoRA in the place of stage 4: the same dense checkpoint, data, order, steps and target modules, a rank that gives
it at least as many parameters as MUE and its router have, MUE's scale (alpha / rank), and several learning rates, of
which the best by mean held-out loss stands against MUE. The split is the same for all seeds: the spread is that of
initial weights and order. The same command continues a study that was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from peft import LoraConfig
from real_records import TASKS, DataError, build
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, set_seed

from trainer.corpus.record import CorpusError
from trainer.evaluate.held_out import load_held_out, measure
from trainer.origin import load_model
from trainer.recipe import STAGES, Recipe, RecipeError, load_recipe
from trainer.stages.build import stage_records
from trainer.stages.checkpoints import read_metrics
from trainer.stages.fit import fit
from trainer.stages.sft import dialogue_trainer
from trainer.stages.view import View

ROOT = Path(__file__).resolve().parent
POINTS = ("start", *STAGES)
FIGURES = (
    "general_perplexity", "domain_perplexity", "assistant_loss", *(f"assistant_loss/{task}" for task in TASKS),
    "preference_accuracy", "preference_margin",
)  # fmt: skip
# What each stage is for, and whether more of it is better.
PURPOSES = (
    ("cpt", "domain_perplexity", False),
    ("sft", "assistant_loss", False),
    ("dfpo", "preference_accuracy", True),
    ("dfpo", "preference_margin", True),
    *(("mue", f"assistant_loss/{task}", False) for task in TASKS),
)
# DFPO's own figures on held-out pairs, over the policy that SFT left, which scores 0.5 and 0 by definition.
REWARDS = {"eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0}
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}  # fmt: skip


class StudyError(ValueError):
    """A run that failed; the message names its log."""


def equal_rank(model: nn.Module, targets: Sequence[str] | str, parameters: int) -> int:
    """The smallest LoRA rank on `targets` (names of linear layers, or all-linear) with at least `parameters`."""
    per_rank = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (name != "lm_head" if targets == "all-linear" else name.rsplit(".", 1)[-1] in targets)
    )
    return math.ceil(parameters / per_rank)


def plain_lora(recipe: Recipe, folder: Path, factor: float) -> dict[str, Any]:
    """Trains LoRA in the place of stage 4 of the run `folder`, at `factor` times MUE's learning rate.

    Returns {"rank", "parameters", "mue_parameters", "learning_rate", "seconds", "figures"}; a second call reads them.
    """
    result = folder / f"lora-{factor:g}.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    corpus, stage = recipe.corpus.records, recipe.stages.mue
    assert corpus is not None
    stage = stage.model_copy(update={"learning_rate": factor * stage.learning_rate, "evaluate_every": 0})
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    set_seed(recipe.seed)
    model = load_model(folder / "3-dfpo", recipe, tokenizer, stage)
    adapter = load_file(folder / "4-mue/adapter_model.safetensors")
    experts = sum(tensor.numel() for tensor in adapter.values())
    targets = stage.target_modules
    rank = equal_rank(model, targets, experts)
    config = LoraConfig(
        r=rank,
        lora_alpha=round(rank * stage.alpha / stage.r),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )  # type: ignore[call-arg]
    checkpoints = folder / "checkpoints" / f"lora-{factor:g}"
    records = stage_records("mue", corpus)
    trainer = dialogue_trainer(model, tokenizer, recipe, stage, records, [], checkpoints, config)
    metrics = folder / f"lora-{factor:g}.jsonl"
    fitted, _ = fit(trainer, f"lora-{factor:g}", metrics, View(Console(quiet=True)), gpu=False)
    adapted: Any = trainer.model
    figures = measure(adapted, tokenizer, load_held_out(corpus), stage.max_length, bf16=recipe.bf16)
    shutil.rmtree(checkpoints, ignore_errors=True)
    found = {
        "rank": rank,
        "parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "mue_parameters": experts,
        "learning_rate": stage.learning_rate,
        "seconds": fitted["seconds"],
        "figures": figures,
    }
    part = result.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1), encoding="utf-8")
    part.rename(result)
    return found


def study_seed(recipe_file: Path, overrides: list[str], folder: Path, factors: list[float]) -> dict[str, Any]:
    """One run of the recipe and its LoRA counterparts; what is done already is only read. Raises StudyError."""
    started, log = time.monotonic(), folder.with_suffix(".log")
    command = [sys.executable, "-m", "pediatricsgpt", "train", str(recipe_file), *overrides, "-o", str(folder)]
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise StudyError(f"{folder} did not end (exit {code}): {' '.join(last)} The whole log is {log}.")
    recipe = load_recipe(recipe_file, overrides)
    loras = {f"{factor:g}": plain_lora(recipe, folder, factor) for factor in factors}
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    evaluations = [row for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == "dfpo"]
    last = next((row for row in reversed(evaluations) if "eval_loss" in row), {})
    return {
        "seed": recipe.seed,
        "held_out": run["held_out"],
        "rewards": {name: last[name] for name in REWARDS if name in last},
        "stages": {
            name: {k: stage[k] for k in ("steps", "seconds", "tokens")} for name, stage in run["stages"].items()
        },
        "lora": loras,
        "seconds": round(time.monotonic() - started, 1),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def verdict(differences: Sequence[float], more_is_better: bool) -> str:
    """What paired differences (after − before, one a seed) say: only agreement of all seeds counts."""
    better = sum((difference > 0) if more_is_better else (difference < 0) for difference in differences)
    if better == len(differences):
        return "improved"
    return f"not shown: better in {better} of {len(differences)} seeds" if better else "not improved"


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The study's result from `study_seed`'s of each seed.

    {"figures": {point: {figure: spread}}, "stages": [{stage, figure, before, after, difference, verdict}],
    "mue_against_lora": {"best", "rates": {factor: {figure: spread}}, "difference": {figure: spread}, "verdict": {…}}}
    """

    def at(point: str, figure: str) -> list[float]:
        return [run["held_out"][point][figure] for run in runs]

    figures = {
        point: {figure: spread(at(point, figure)) for figure in FIGURES if figure in runs[0]["held_out"][point]}
        for point in POINTS
    }
    rows = []
    for stage, figure, more in PURPOSES:
        before = POINTS[POINTS.index(stage) - 1]
        rows.append(_row(stage, figure, at(before, figure), at(stage, figure), more))
    for figure, before in REWARDS.items():
        after = [run["rewards"][figure] for run in runs if figure in run["rewards"]]
        if after:
            rows.append(_row("dfpo", figure, [before] * len(after), after, True))
    result = {"figures": figures, "stages": rows}
    return result | ({"mue_against_lora": _against_lora(runs)} if runs[0]["lora"] else {})


def _row(stage: str, figure: str, before: list[float], after: list[float], more: bool) -> dict[str, Any]:
    differences = [now - then for now, then in zip(after, before, strict=True)]
    return {
        "stage": stage,
        "figure": figure,
        "before": spread(before),
        "after": spread(after),
        "difference": spread(differences),
        "verdict": verdict(differences, more),
    }


def _against_lora(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("assistant_loss", *(f"assistant_loss/{task}" for task in TASKS))

    def lora(factor: str, figure: str) -> list[float]:
        return [run["lora"][factor]["figures"][figure] for run in runs]

    best = min(runs[0]["lora"], key=lambda factor: fmean(lora(factor, "assistant_loss")))
    pairs = {name: zip(runs, lora(best, name), strict=True) for name in names}
    differences = {name: [run["held_out"]["mue"][name] - other for run, other in pairs[name]] for name in names}
    verdicts = {}
    for name, values in differences.items():
        lower = sum(value < 0 for value in values)
        verdicts[name] = {len(values): "MUE better", 0: "LoRA better"}.get(lower, "undecided: the seeds disagree")
    first = runs[0]["lora"][best]
    return {
        "best": best,
        "rank": first["rank"],
        "parameters": {"mue": first["mue_parameters"], "lora": first["parameters"]},
        "rates": {factor: {name: spread(lora(factor, name)) for name in names} for factor in runs[0]["lora"]},
        "mue": {name: spread([run["held_out"]["mue"][name] for run in runs]) for name in names},
        "difference": {name: spread(values) for name, values in differences.items()},
        "verdict": verdicts,
    }


def _cell(value: dict[str, float], signed: bool = False) -> str:
    places = 1 if abs(value["mean"]) >= 50 else 3
    return f"{value['mean']:{'+' if signed else ''}.{places}f} ± {value['sd']:.{places}f}"


def tables(result: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    """Figures by stage; what each stage is for; MUE against LoRA. The first row of each names its columns."""
    by_point: list[tuple[str, ...]] = [("held-out figure", *POINTS)]
    for figure in FIGURES:
        cells = [result["figures"][point].get(figure) for point in POINTS]
        by_point.append((figure, *(_cell(cell) if cell else "–" for cell in cells)))
    stages: list[tuple[str, ...]] = [("stage", "is for", "before", "after", "difference", "verdict")]
    for row in result["stages"]:
        cells = (_cell(row["before"]), _cell(row["after"]), _cell(row["difference"], signed=True))
        stages.append((row["stage"], row["figure"], *cells, row["verdict"]))
    found = [by_point, stages]
    if lora := result.get("mue_against_lora"):
        names = [f"LoRA, {factor} × rate" + (" (best)" if factor == lora["best"] else "") for factor in lora["rates"]]
        against: list[tuple[str, ...]] = [("held-out loss", "MUE", *names, "MUE − best LoRA", "verdict")]
        for figure, value in lora["mue"].items():
            rates = [_cell(rate[figure]) for rate in lora["rates"].values()]
            difference = _cell(lora["difference"][figure], signed=True)
            against.append((figure, _cell(value), *rates, difference, lora["verdict"][figure]))
        found.append(against)
    return found


def _print_tables(result: dict[str, Any], seeds: Sequence[int]) -> None:
    print(f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}")
    for table in tables(result):
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        print()
        for row in table:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if lora := result.get("mue_against_lora"):
        size = lora["parameters"]
        print(f"\ntrainable: MUE with router {size['mue']:,}, LoRA of rank {lora['rank']} {size['lora']:,}")


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    """Builds the corpus, runs all seeds, `jobs` at a time, and returns their summary."""
    records = arguments.records.resolve()
    manifest = build(arguments.data, records)
    overrides = [f"corpus={json.dumps({'records': str(records)})}", *arguments.overrides]
    name = load_recipe(arguments.recipe, overrides).name
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ.update(_ENVIRONMENT)  # the workers inherit it and load torch afterwards
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(
                study_seed,
                arguments.recipe,
                [*overrides, f"seed={seed}"],
                arguments.work / f"{name}-{seed}",
                arguments.lora_rates,
            )
            for seed in arguments.seeds
        ]
        runs = []
        for seed, future in zip(arguments.seeds, futures, strict=True):
            runs.append(future.result())
            print(f"seed {seed}: done in {runs[-1]['seconds']:.0f} s", file=sys.stderr)
    return {"recipe": name, "records": manifest["counts"], **summary(runs), "runs": runs}


def main() -> int:
    """Prints the tables, or one JSON object; exit code 1 when a stage did not improve what it is for in every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="the upstream files")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/real.yaml", help="file or shipped name")
    parser.add_argument("--records", type=Path, default=Path("PedCorpus/real"), help="where the corpus is built")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="where the runs stand")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument(
        "--lora-rates", type=float, nargs="*", default=[1.0, 2.0], metavar="FACTOR",
        help="learning rates of the plain LoRA, as multiples of MUE's; none: no LoRA",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_intermixed_args()
    try:
        result = study(arguments)
    except (DataError, CorpusError, RecipeError, StudyError, OSError) as error:
        print(f"stages: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        _print_tables(result, arguments.seeds)
    return 0 if all(row["verdict"] == "improved" for row in result["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main())
