"""Checkpoints of a stage and its rows in metrics.jsonl, as a killed process or a failing disk may have left them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import xxhash
from transformers.trainer_callback import TrainerState

SEAL = "seal.json"
KEPT = 2


def seal(folder: Path) -> None:
    """Writes the size and digest of every file into seal.json and flushes all of it to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in files}
    (folder / SEAL).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    for path in [*files, folder / SEAL]:
        flush(path)


def damaged_file(folder: Path) -> str | None:
    """The first file of a checkpoint that is not as it was sealed (or seal.json itself), None when all are."""
    try:
        digests = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name, (size, digest) in digests.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size or _digest(path) != digest:
                return name
        TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (OSError, ValueError, TypeError, AttributeError):
        return SEAL
    return None


def last_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for every newer one, which is set aside as `damaged-…`.

    A stage writes its checkpoints beside this folder and renames them when they are sealed, so a kill leaves none
    half-written here; what is not whole was damaged later.
    """
    warnings = []
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        name = damaged_file(path)
        if name is None:
            return path, warnings
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        warnings.append(f"{path.name} is damaged ({name} is not as it was written); it is set aside as {aside.name}")
    return None, warnings


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; nothing is moved."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((path for path in found if damaged_file(path) is None), None)


def step_of(checkpoint: Path) -> int:
    """Number of the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def forget_old(folder: Path, best: int | None) -> None:
    """Deletes all checkpoints but the newest two and the best."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of)
    for path in found[:-KEPT]:
        if step_of(path) != best:
            shutil.rmtree(path)


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


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Writes a file's (or folder's) content through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # some systems cannot flush folders
            raise
    finally:
        os.close(descriptor)
