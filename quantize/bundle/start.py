"""Starts the app with the model it was installed with; lies beside release.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def arguments(argv: list[str], model: str | None) -> list[str]:
    """Adds `--model` to consult and ask; one that the user gives comes later and therefore wins."""
    if model is None or argv[:1] in (["-h"], ["--help"], ["--version"]):
        return argv
    bare = not argv or argv[0].startswith("-")
    command, rest = ("consult", argv) if bare else (argv[0], argv[1:])
    return [command, "--model", model, *rest] if command in ("consult", "ask") else argv


def main() -> int:
    """Runs the front door of the app; returns its exit code."""
    from pediatricsgpt import main as front_door

    release = Path(__file__).resolve().parent
    model = json.loads((release / "release.json").read_text(encoding="utf-8"))["model"]
    path = str(release.parents[1] / "model" / model) if model else None
    return front_door(arguments(sys.argv[1:], path))


if __name__ == "__main__":
    raise SystemExit(main())
