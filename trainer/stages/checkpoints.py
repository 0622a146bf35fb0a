"""Checkpoints of a stage and its rows in metrics.jsonl, as a killed process may have left them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState


def last_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that was written to its end, and the names of unfinished ones, which are deleted.

    The Trainer writes trainer_state.json last, so a checkpoint without a readable one was cut off.
    """
    removed = []
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            TrainerState.load_from_json(str(path / "trainer_state.json"))
            return path, removed
        except (OSError, ValueError, TypeError):
            shutil.rmtree(path)
            removed.append(path.name)
    return None, removed


def read_metrics(file: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last line cut off by a kill is left out."""
    rows = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def forget_after(file: Path, stage: str, step: int) -> None:
    """Drops the rows of a stage's steps that will be made again because they came after its last checkpoint."""
    rows = [row for row in read_metrics(file) if row["stage"] != stage or row["step"] <= step]
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)
