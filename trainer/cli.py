"""Commands of the trainer room: `corpus`, `train`, `evaluate`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from trainer.corpus.record import CorpusError
from trainer.recipe import Recipe, RecipeError, load_recipe


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"pediatricsgpt {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _default_corpus(recipe: Recipe) -> Path:
    return Path("PedCorpus") / recipe.name


def corpus(argv: list[str]) -> int:
    """Builds a corpus folder from the cards."""
    parser = _parser(
        "corpus",
        "Build PedCorpus from the cards: CPT text, grounded dialogues of the three tasks, preference pairs and the\n"
        "held-out questions. The same recipe always gives the same bytes.",
        "example:\n  pediatricsgpt corpus trainer/recipes/demo.yaml",
    )
    parser.add_argument("recipe", type=Path, help="recipe file, e.g. trainer/recipes/demo.yaml")
    parser.add_argument("-o", "--output", type=Path, help="corpus folder (default: PedCorpus/NAME)")
    parser.add_argument("--json", action="store_true", help="print the manifest's counts as one JSON object")
    arguments = parser.parse_args(argv)
    from trainer.corpus.build import build_corpus

    console = Console(stderr=True)
    try:
        recipe = load_recipe(arguments.recipe)
        folder = arguments.output or _default_corpus(recipe)
        with console.status("building the corpus"):
            manifest = build_corpus(
                recipe, folder, lambda name, count: console.print(f"  {name:<20} {count:>7} records")
            )
    except (RecipeError, CorpusError, OSError) as error:
        return _fail(error)
    console.print(f"wrote {folder}")
    if arguments.json:
        print(
            json.dumps(
                {"folder": str(folder), "counts": manifest["counts"], "cards": manifest["cards"]},
                ensure_ascii=False,
            )
        )
    return 0


def train(argv: list[str]) -> int:
    """Runs the four stages of a recipe."""
    parser = _parser(
        "train",
        "Train CPT → SFT → DFPO → MUE from one recipe. Ctrl-C writes a checkpoint; the same command continues.\n"
        "The corpus is built first if it is not there.",
        "examples:\n  pediatricsgpt train trainer/recipes/demo.yaml\n  pediatricsgpt train my.yaml --output runs/trial",
    )
    parser.add_argument("recipe", type=Path, help="recipe file, e.g. trainer/recipes/demo.yaml")
    parser.add_argument("-o", "--output", type=Path, help="run folder (default: runs/NAME)")
    parser.add_argument("--corpus", type=Path, help="corpus folder (default: PedCorpus/NAME)")
    parser.add_argument("--json", action="store_true", help="print the stages' results as one JSON object")
    arguments = parser.parse_args(argv)
    # Trainers of TRL report their use to a hub; here nothing leaves the machine.
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    console = Console(stderr=True)
    try:
        recipe = load_recipe(arguments.recipe)
        with console.status("loading the training libraries"):
            from trainer.run import Run, RunError
            from trainer.stages.common import Interrupted
        folder = arguments.output or Path("runs") / recipe.name
        run = Run(recipe, folder, arguments.corpus or _default_corpus(recipe), console)
    except (RecipeError, OSError) as error:
        return _fail(error)
    try:
        run.execute()
    except (CorpusError, RunError, OSError) as error:
        return _fail(error)
    except (Interrupted, KeyboardInterrupt):
        console.print(f"Stopped. `pediatricsgpt train {arguments.recipe}` continues from the last checkpoint.")
        return 130
    for stage, result in run.record["stages"].items():
        console.print(
            f"{stage.upper():<5} {result['steps']:>6} steps  loss {result['loss']:.3f}  {result['seconds']:>7.1f} s"
        )
    console.print(f"wrote {folder}; next: pediatricsgpt quantize {folder}")
    if arguments.json:
        print(json.dumps({"folder": str(folder), "stages": run.record["stages"]}))
    return 0


def _fail(error: Exception) -> int:
    print(f"pediatricsgpt: {error}", file=sys.stderr)
    return 2


COMMANDS: dict[str, Callable[[list[str]], int]] = {"corpus": corpus, "train": train}
