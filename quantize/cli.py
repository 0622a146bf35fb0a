"""Commands of the shipping room; each is loaded when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial


def _call(module: str, argv: list[str]) -> int:
    return importlib.import_module(f"quantize.commands.{module}").main(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    name: partial(_call, name) for name in ("quantize", "verify", "bundle", "push", "pull")
}


def main(argv: list[str]) -> int:
    """`pediatricsgpt quantize`."""
    return COMMANDS["quantize"](argv)
