"""Where unfinished files live, and how finished ones get their final names."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quantize.distribution.manifest import DOCUMENTS, MANIFEST, REPORT, SUMS, is_name, write_json
from quantize.errors import BadInput
from quantize.run_folder import file_sha256

LOCK = ".quantize.lock"
FAILED = "fidelity-failed.json"
_WORK = ".quantize.part"
_ASIDE, _JOURNAL = "aside", "publishing.json"


def refuse_overwriting(output: Path, targets: Sequence[Path], force: bool) -> None:
    """Raises BadInput when `output` holds an export and `force` is not set."""
    if output.exists() and not output.is_dir():
        raise BadInput(f"{output} is a file; choose a folder with --output.")
    documents = [output / name for name in DOCUMENTS if name != REPORT]  # a failed export leaves its report
    for path in () if force else (*documents, *targets):
        if path.exists():
            kind = "an export" if (output / MANIFEST).exists() else "files of the same names"
            raise BadInput(f"{output} already holds {kind} ({path.name}); replace it with --force or choose --output.")


def refuse_full_disk(output: Path, needed: int) -> None:
    """Raises BadInput when the disk of `output` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(output).free
    if free < needed:
        raise BadInput(
            f"The disk of {output} has {free / 2**30:.2f} GiB free, this export needs {needed / 2**30:.2f} GiB; "
            "free some space, choose another --output, or fewer --quant."
        )


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keeps every other command out of a folder, and first undoes what a killed one left half published.

    Makes the folder, and removes it again when nothing came into it. Raises BadInput when another command has it.
    """
    created = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BadInput(f"Another export is writing to {output}; wait for it or choose another folder.") from error
    try:
        if (output / _WORK / _JOURNAL).exists():
            _take_back(output)
        yield
    finally:
        lock.release()
        (output / LOCK).unlink(missing_ok=True)
        if created and not any(output.iterdir()):
            output.rmdir()


@contextlib.contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """A folder beside the final files, emptied of what a killed run left, and removed at the end.

    Raises BadInput when another command is using it.
    """
    with locked(output):
        work = output / _WORK
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            yield work
        finally:
            if not (work / _JOURNAL).exists():  # else earlier files are still aside; the next command returns them
                shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def disk_failures(output: Path) -> Iterator[None]:
    """Turns a failing disk into BadInput with the reason."""
    try:
        yield
    except OSError as error:
        # numpy reports a short write without an error number.
        short_write = error.errno is None and "requested and" in str(error)
        if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(f"The disk of {output} is full; free some space or choose another folder.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise BadInput(f"{error.filename or output} may not be written or read; choose another folder.") from error
        raise BadInput(f"Stopped at a file: {error}") from error


def publish(output: Path, files: Mapping[Path, Path], keep: Collection[Path] = ()) -> None:
    """Gives finished files (final name → unfinished) their names, all or none, SHA256SUMS last.

    What an earlier distribution alone had goes away, except `keep`; what was not its own, or was changed since,
    stays. The earlier files are set aside first: when a rename fails, or when the process is killed and the
    next command locks the folder, they come back.
    """
    for part in files.values():
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    work = output / _WORK
    stale = _stale(output, {*files, *keep})
    earlier = [*stale, *(path for path in files if path.exists())]
    names = {key: [_relative(path, output) for path in paths] for key, paths in (("old", earlier), ("new", files))}
    shutil.rmtree(work / _ASIDE, ignore_errors=True)
    work.mkdir(exist_ok=True)
    write_json(work / _JOURNAL, names)
    try:
        for path in earlier:
            _move(path, work / _ASIDE / _relative(path, output))
        for final in sorted(files, key=lambda path: path.name == SUMS):
            _move(files[final], final)
    except BaseException:
        _take_back(output)
        raise
    _flush(output)
    (work / _JOURNAL).unlink()
    (output / FAILED).unlink(missing_ok=True)
    shutil.rmtree(work / _ASIDE, ignore_errors=True)
    for folder in {work, *(path.parent for path in stale)} - {output}:
        with contextlib.suppress(OSError):  # something else lies in it
            folder.rmdir()


def keep_report(output: Path, report: dict[str, Any]) -> Path:
    """Leaves the report of a failed export as fidelity.json.

    Beside an earlier good export it is fidelity-failed.json: it is about files that were thrown away.
    """
    file = output / (FAILED if (output / MANIFEST).exists() else REPORT)
    part = output / _WORK / file.name
    write_json(part, report)
    os.replace(part, file)
    return file


def _stale(output: Path, wanted: Collection[Path]) -> list[Path]:
    """Files of an earlier distribution that are not wanted and still what its manifest says."""
    try:
        outputs = json.loads((output / MANIFEST).read_text(encoding="utf-8"))["outputs"]
        named = {output / name: value["sha256"] for name, value in outputs.items() if is_name(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [
        path for path, digest in named.items() if path not in wanted and path.is_file() and file_sha256(path) == digest
    ]


def _take_back(output: Path) -> None:
    """Undoes a publication: its new files go, the earlier ones return from aside."""
    work = output / _WORK
    try:
        names = json.loads((work / _JOURNAL).read_text(encoding="utf-8"))
    except ValueError:  # killed while the journal was written: nothing was moved yet
        names = {"old": [], "new": []}
    for name in names["new"]:
        # An earlier namesake that is not aside yet is still in its place.
        if name not in names["old"] or (work / _ASIDE / name).exists():
            (output / name).unlink(missing_ok=True)
    for name in names["old"]:
        if (work / _ASIDE / name).exists():
            _move(work / _ASIDE / name, output / name)
    (work / _JOURNAL).unlink()


def _relative(path: Path, output: Path) -> str:
    return path.relative_to(output).as_posix()


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _flush(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot open a folder; there the rename is durable enough
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
