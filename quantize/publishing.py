"""Where unfinished files live, and how finished ones get their final names."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quantize.distribution import write_json
from quantize.errors import BadInput

_WORK = ".quantize.part"
_LOCK = ".quantize.lock"
# Bytes per weight, for the disk check; matrices too narrow for 256-blocks fall back to larger types.
_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 1.07, "Q6_K": 1.07, "IQ4_XS": 0.8, "Q4_0": 0.8}
_BYTES_MIXED = 1.0
_SPARE_BYTES = 64 << 20


def refuse_overwriting(output: Path, targets: Sequence[Path], force: bool) -> None:
    """Raises BadInput when `output` holds an export and `force` is not set."""
    if output.exists() and not output.is_dir():
        raise BadInput(f"{output} is a file; choose a folder with --output.")
    for path in () if force else (output / "manifest.json", *targets):
        if path.exists():
            raise BadInput(
                f"{output} already holds an export ({path.name}); replace it with --force or choose --output."
            )


def refuse_full_disk(output: Path, parameters: int, types: set[str], logits_bytes: int) -> None:
    """Raises BadInput when the files of all `types` and the compared logits would not fit."""
    weights = parameters * sum(_BYTES.get(kind, _BYTES_MIXED) for kind in types)
    needed = int(weights) + logits_bytes + _SPARE_BYTES
    free = shutil.disk_usage(output).free
    if free < needed:
        raise BadInput(
            f"The disk of {output} has {free / 2**30:.2f} GiB free, this export needs {needed / 2**30:.2f} GiB; "
            "free some space, choose another --output, or fewer --quant."
        )


@contextlib.contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A folder beside the final files, emptied of what a killed run left, and removed at the end.

    Raises BadInput when another export is using it.
    """
    created = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BadInput(f"Another export is writing to {output}; wait for it or choose another --output.") from error
    work = output / _WORK
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()
        (output / _LOCK).unlink(missing_ok=True)
        if created and not any(output.iterdir()):
            output.rmdir()


@contextlib.contextmanager
def disk_failures(output: Path) -> Iterator[None]:
    """Turns a failing disk into BadInput with the reason."""
    try:
        yield
    except OSError as error:
        # numpy reports a short write without an error number.
        short_write = error.errno is None and "requested and" in str(error)
        if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(f"The disk of {output} is full; free some space or choose another --output.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BadInput(
                f"{error.filename or output} may not be written or read; choose another --output."
            ) from error
        raise BadInput(f"The export stopped at a file: {error}") from error


def publish(output: Path, files: Mapping[Path, Path]) -> None:
    """Moves finished files (final name → unfinished) in order; removes what an earlier export alone had."""
    for part in files.values():
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    stale = {output / name for name in _outputs(output)} - set(files)
    for name in ("SHA256SUMS", "manifest.json", "fidelity-failed.json"):
        (output / name).unlink(missing_ok=True)
    for final, part in files.items():
        os.replace(part, final)
    for file in stale:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows cannot open a folder; there the rename is durable enough
        folder = os.open(output, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def keep_report(output: Path, report: dict[str, Any]) -> Path:
    """Leaves the report of a failed export as fidelity.json.

    Beside an earlier good export it is fidelity-failed.json: it is about files that were thrown away.
    """
    file = output / ("fidelity-failed.json" if (output / "manifest.json").exists() else "fidelity.json")
    part = output / _WORK / file.name
    write_json(part, report)
    os.replace(part, file)
    return file


def _outputs(output: Path) -> list[str]:
    try:
        names = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["outputs"]
        return [name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        return []
