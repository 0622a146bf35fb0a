"""What the trainer's commands share: their parser, their recipe argument, their way to say an error."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from trainer.recipe import Recipe, shipped_recipes


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help keeps its line breaks."""
    return argparse.ArgumentParser(
        prog=f"pediatricsgpt {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """RECIPE and KEY=VALUE overrides."""
    names = ", ".join(shipped_recipes())
    parser.add_argument(
        "recipe", type=Path, nargs="?" if optional else None, help=f"recipe file, or a shipped one: {names}"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change a key, e.g. stages.sft.learning_rate=1e-5"
    )


def default_corpus(recipe: Recipe) -> Path:
    """Where a recipe's corpus is built unless another place is given."""
    return recipe.corpus.records or Path("PedCorpus") / recipe.name


def work_offline() -> None:
    """Before the training libraries are loaded: nothing leaves the machine, and they keep quiet about it.

    Trainers of TRL would report their use to a hub, and bitsandbytes warns of kernels that only a hub could give.
    """
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def fail(error: Exception) -> int:
    """Prints the message of an error that the user can mend; exit code 2."""
    print(f"pediatricsgpt: {error}", file=sys.stderr)
    return 2
