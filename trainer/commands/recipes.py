"""`pediatricsgpt recipes`: the shipped recipes, to read and to copy."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.commands.shared import command_parser, fail
from trainer.recipe import SHIPPED, RecipeError, load_recipe, shipped_recipes


def main(argv: list[str]) -> int:
    """Lists, shows or copies recipes."""
    parser = command_parser(
        "recipes",
        "The recipes that come with PediatricsGPT. Copy the one nearest to what you want and change it; `train` also\n"
        "takes single changes as KEY=VALUE.",
        "examples:\n  pediatricsgpt recipes\n  pediatricsgpt recipes show qwen3-4b\n"
        "  pediatricsgpt recipes copy qwen3-4b my.yaml\n"
        "  pediatricsgpt recipes copy fsdp2 fsdp2.yaml      (for accelerate launch; also ddp and zero3)",
    )
    parser.add_argument("action", nargs="?", default="list", choices=["list", "show", "copy"])
    parser.add_argument("name", nargs="?", help="recipe to show or copy")
    parser.add_argument("file", nargs="?", type=Path, help="where to copy it")
    arguments = parser.parse_args(argv)
    if arguments.action == "list":
        print_recipes()
        return 0
    # The launcher's files are no recipes, but an installed package has no other place to take them from.
    recipes = shipped_recipes() | {path.stem: path for path in sorted((SHIPPED / "accelerate").glob("*.yaml"))}
    if arguments.name not in recipes:
        return fail(RecipeError(f"There is no recipe {arguments.name!r}. Shipped: {', '.join(recipes)}."))
    source = recipes[arguments.name]
    if arguments.action == "show":
        print(source.read_text(encoding="utf-8"), end="")
        return 0
    if arguments.file is None:
        parser.error("say where to: pediatricsgpt recipes copy NAME FILE")
    if arguments.file.exists():
        return fail(RecipeError(f"{arguments.file} is there already; give another name."))
    try:
        text = re.sub(
            rf"^name: {re.escape(source.stem)}$",
            f"name: {_run_name(arguments.file)}",
            source.read_text("utf-8"),
            flags=re.M,
        )
        arguments.file.write_text(text, encoding="utf-8")
    except OSError as error:
        return fail(error)
    is_recipe = arguments.name in shipped_recipes()
    next_step = (
        f"pediatricsgpt plan {arguments.file}" if is_recipe else f"accelerate launch --config_file {arguments.file} …"
    )
    print(f"wrote {arguments.file}; next: {next_step}")
    return 0


def print_recipes() -> None:
    """One line per recipe: its name, its origin, what its first comment says."""
    view = Table("recipe", "starts from", "what it is", box=None, pad_edge=False)
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        view.add_row(name, recipe.base or "random weights", first)
    Console().print(view)


def _run_name(file: Path) -> str:
    """A file's name as a run's name."""
    return re.sub(r"[^a-z0-9._-]+", "-", file.stem.lower()).strip("-._") or "mine"
