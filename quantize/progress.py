"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# (what is being done, done, total)
Progress = Callable[[str, int, int], None]


def labelled(progress: Progress, label: str) -> Callable[[int, int], None]:
    """`progress` of one piece of work: takes done and total."""
    return lambda done, total: progress(label, done, total)
