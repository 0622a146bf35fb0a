"""`pediatricsgpt corpus`: builds a corpus folder from the cards."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from trainer.commands.shared import add_recipe, command_parser, default_corpus, fail
from trainer.corpus.record import CorpusError
from trainer.recipe import RecipeError, load_recipe


def main(argv: list[str]) -> int:
    """Builds a corpus folder from the cards."""
    parser = command_parser(
        "corpus",
        "Build PedCorpus from the cards: CPT text, grounded dialogues of the three tasks, preference pairs and the\n"
        "held-out questions. The same recipe always gives the same bytes.",
        "examples:\n  pediatricsgpt corpus demo\n  pediatricsgpt corpus my.yaml corpus.dialogues=20000",
    )
    add_recipe(parser)
    parser.add_argument("-o", "--output", type=Path, help="corpus folder (default: PedCorpus/NAME)")
    parser.add_argument("--json", action="store_true", help="print the manifest's counts as one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    from trainer.corpus.build import build_corpus

    console = Console(stderr=True)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        folder = arguments.output or default_corpus(recipe)
        with console.status("building the corpus"):
            manifest = build_corpus(
                recipe, folder, lambda name, count: console.print(f"  {name:<20} {count:>7} records")
            )
    except (RecipeError, CorpusError, OSError) as error:
        return fail(error)
    console.print(f"wrote {folder}")
    if arguments.json:
        print(
            json.dumps(
                {"folder": str(folder), "counts": manifest["counts"], "held_out_cards": manifest["held_out_cards"]},
                ensure_ascii=False,
            )
        )
    return 0
