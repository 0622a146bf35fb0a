"""Commands of the trainer room; each is loaded when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial


def _call(module: str, argv: list[str]) -> int:
    return importlib.import_module(f"trainer.commands.{module}").main(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    name: partial(_call, name.replace("-", "_"))
    for name in ("corpus", "recipes", "plan", "preview", "train", "evaluate", "import-mue")
}
