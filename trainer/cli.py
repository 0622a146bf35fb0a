"""Commands of the trainer room: `corpus`, `train`, `evaluate`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

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
                {"folder": str(folder), "counts": manifest["counts"], "held_out_cards": manifest["held_out_cards"]},
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
        command = shlex.join(["pediatricsgpt", "train", *argv])
        console.print(f"Stopped. `{command}` continues from the last checkpoint.", soft_wrap=True)
        return 130
    for stage, result in run.record["stages"].items():
        console.print(
            f"{stage.upper():<5} {result['steps']:>6} steps  loss {result['loss']:.3f}  {result['seconds']:>7.1f} s"
        )
    console.print(f"wrote {folder}; next: pediatricsgpt quantize {folder}")
    if arguments.json:
        print(json.dumps({"folder": str(folder), "stages": run.record["stages"]}))
    return 0


def evaluate(argv: list[str]) -> int:
    """Measures the embedded model on held-out questions."""
    parser = _parser(
        "evaluate",
        "Ask the held-out questions through `pediatricsgpt ask --batch` and print one table per mode.\n"
        "The limits hold for quote mode; exit code 1 means that one of them is missed.",
        "examples:\n  pediatricsgpt evaluate embedded\n  pediatricsgpt evaluate embedded --mode quote --json\n"
        "  pediatricsgpt evaluate embedded --model dist/demo/demo-Q8_0.gguf",
    )
    parser.add_argument("what", choices=["embedded"], help="what to measure")
    parser.add_argument("--model", type=Path, help="GGUF file (default: the embedded model)")
    parser.add_argument("--mode", action="append", choices=["quote", "grounded", "free"], help="default: all three")
    parser.add_argument("--set", default="test", choices=["test", "development"], help="which questions")
    parser.add_argument("--answers", type=Path, help="also write every answer with its verdict to this JSON Lines file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from trainer.evaluate import embedded

    console = Console(stderr=True)
    tables: dict[str, dict[str, float]] = {}
    rows: list[dict[str, object]] = []
    try:
        if arguments.answers:
            arguments.answers.touch()  # a bad path is said before the questions are asked, not after
        questions = embedded.load_questions(arguments.set)
        library = embedded.library_sentences()
        for mode in arguments.mode or embedded.MODES:
            with console.status(f"{mode}: {len(questions)} questions"):
                answers = embedded.ask(questions, mode, arguments.model)
            judged = [embedded.judge(q, a, library) for q, a in zip(questions, answers, strict=True)]
            tables[mode] = embedded.table(judged)
            rows += [{**j.question.model_dump(), **j.answer, "on_topic": j.on_topic} for j in judged]
    except (embedded.EvaluationError, CorpusError, OSError) as error:
        return _fail(error)
    if arguments.answers:
        arguments.answers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    held = embedded.gates(tables["quote"]) if "quote" in tables else {}
    if arguments.json:
        print(json.dumps({"set": arguments.set, **tables.get("quote", {}), "modes": tables, "gates": held}))
    else:
        _print_tables(tables, held, embedded.GATES)
    return 0 if all(held.values()) else 1


def _print_tables(tables: dict[str, dict[str, float]], held: dict[str, bool], limits: dict[str, float]) -> None:
    view = Table("figure", *tables, "limit (quote)", "")
    for name in next(iter(tables.values())):
        mark = {True: "held", False: "MISSED"}.get(held.get(name), "")  # type: ignore[arg-type]
        view.add_row(name, *(f"{figures[name]:g}" for figures in tables.values()), str(limits.get(name, "")), mark)
    Console().print(view)


def _fail(error: Exception) -> int:
    print(f"pediatricsgpt: {error}", file=sys.stderr)
    return 2


COMMANDS: dict[str, Callable[[list[str]], int]] = {"corpus": corpus, "train": train, "evaluate": evaluate}
