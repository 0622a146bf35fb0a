"""PediatricsGPT's front door: one command, whose parts are loaded only when they are called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

# command → (package, extra that installs what it needs, one line for --help)
COMMANDS = {
    "consult": ("tui", None, "open the consultation (also without a command)"),
    "ask": ("tui", None, "ask one question, or a batch, from the shell"),
    "corpus": ("trainer", "train", "build PedCorpus from the cards"),
    "recipes": ("trainer", "train", "list, show and copy the shipped recipes"),
    "plan": ("trainer", "train", "what a recipe will cost: memory, steps, disk, time"),
    "preview": ("trainer", "train", "see what a stage is fed, with the loss mask in colour"),
    "train": ("trainer", "train", "train a model from a recipe: CPT, SFT, DFPO, MUE"),
    "evaluate": ("trainer", "train", "measure a model through the app's own door"),
    "import-mue": ("trainer", "train", "convert an adapter of the paper's released code"),
    "quantize": ("quantize", "quantize", "merge the experts and write one GGUF file, checked"),
    "verify": ("quantize", "quantize", "check any GGUF file, alone or against its source"),
    "bundle": ("quantize", "quantize", "everything a clinic laptop needs on a USB stick, installed without a network"),
    "push": ("quantize", "quantize", "publish a distribution on a model hub"),
    "pull": ("quantize", "quantize", "fetch a distribution from a model hub, checksums verified"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 1 a gate failed, 2 wrong use or bad input, 130 Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "--version"):
        arguments = ["consult", *arguments]
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from importlib.metadata import version

        print(version("pediatricsgpt"))
        return 0
    if name not in COMMANDS:
        print(f"pediatricsgpt: there is no command {name!r}. See `pediatricsgpt --help`.", file=sys.stderr)
        return 2
    package, extra, _ = COMMANDS[name]
    try:
        command: Callable[[list[str]], int] = importlib.import_module(f"{package}.cli").COMMANDS[name]
        return command(rest)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("tui", "trainer", "quantize"):
            raise
        remedy = f"pip install 'pediatricsgpt[{extra}]' (in a clone: make install)" if extra else "make run"
        print(
            f"pediatricsgpt: `{name}` needs {error.name}, which is not installed. Add it with: {remedy}.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("pediatricsgpt: stopped.", file=sys.stderr)
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items())
    return (
        "usage: pediatricsgpt [COMMAND] [OPTIONS]\n\n"
        "An offline Chinese pediatric assistant: corpus → train → quantize → consult.\n\n"
        f"{rows}\n\n"
        "`pediatricsgpt COMMAND --help` explains each command. Without one the consultation opens.\n"
        "The embedded model is a demonstration; it must not be used for clinical decisions."
    )


if __name__ == "__main__":
    raise SystemExit(main())
