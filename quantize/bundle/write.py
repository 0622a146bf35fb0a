"""Writes a bundle onto a stick: resumable, complete or recognisably unfinished, and the same bytes every time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from quantize.bundle.contents import Contents, Item, item
from quantize.bundle.installer import LITTER
from quantize.bundle.portable import Progress
from quantize.errors import BadInput
from quantize.run_folder import file_sha256

_WORK = ".part"
_SPARE_BYTES = 8 << 20
_BLOCK = 1 << 20


def finished(contents: Contents) -> tuple[Item, ...]:
    """All files in the order they are written; bundle.json and SHA256SUMS, which name the others, are the last."""
    files = {i.name: {"sha256": i.sha256, "bytes": i.bytes} for i in contents.items}
    facts: dict[str, Any] = {**contents.facts, "files": files}
    text = json.dumps(facts, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    bundle = item("bundle.json", text.encode("utf-8"))
    named = sorted([*contents.items, bundle], key=lambda i: i.name)
    sums = item("SHA256SUMS", "".join(f"{i.sha256}  {i.name}\n" for i in named).encode("utf-8"))
    return (*contents.items, bundle, sums)


def write(contents: Contents, output: Path, progress: Progress) -> tuple[Item, ...]:
    """Writes the bundle; returns its files. Files that are already there with the right content are kept.

    Until everything is written the folder holds no SHA256SUMS and the installer refuses it. Raises BadInput when the
    folder holds other files, or the disk is too small.
    """
    items = finished(contents)
    refuse_foreign(output)
    output.mkdir(parents=True, exist_ok=True)
    work = output / _WORK
    todo = [i for i in items if not (_whole(output, i) or _whole(work, i))]
    needed = sum(i.bytes for i in todo) + _SPARE_BYTES
    free = shutil.disk_usage(output).free
    if free < needed:
        raise BadInput(
            f"{output} has {free / 2**20:.0f} MiB free, the bundle needs {needed / 2**20:.0f} MiB; "
            "use a larger stick or a smaller --quant."
        )
    total, done = sum(i.bytes for i in todo), 0
    try:
        for entry in todo:
            _copy(entry, work, lambda count: progress("writing the bundle", count, total), done)
            done += entry.bytes
        _publish(items, work, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BadInput(f"{output} is full, or its format does not take such large files ({error}).") from error
        raise
    return items


def _copy(entry: Item, work: Path, tell: Any, done: int) -> None:
    final = work / entry.name
    final.parent.mkdir(parents=True, exist_ok=True)
    half = final.with_name(final.name + ".half")
    with half.open("wb") as target:
        if isinstance(entry.source, bytes):
            target.write(entry.source)
        else:
            with entry.source.open("rb") as source:
                while block := source.read(_BLOCK):
                    target.write(block)
                    done += len(block)
                    tell(done)
        target.flush()
        os.fsync(target.fileno())
    if file_sha256(half) != entry.sha256:
        half.unlink()
        raise BadInput(f"{entry.source} changed while it was copied, or the stick is faulty; start again.")
    os.replace(half, final)


def _publish(items: tuple[Item, ...], work: Path, output: Path) -> None:
    names = {entry.name for entry in items}
    if not _whole(output, items[-1]):
        (output / "SHA256SUMS").unlink(missing_ok=True)
    for entry in items:
        if (work / entry.name).exists():
            (output / entry.name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / entry.name, output / entry.name)
    shutil.rmtree(work, ignore_errors=True)
    for path in sorted(output.rglob("*"), reverse=True):  # what an earlier bundle alone had
        if path.is_file() and path.relative_to(output).as_posix() not in names and not _is_litter(path, output):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _whole(folder: Path, entry: Item) -> bool:
    path = folder / entry.name
    return path.is_file() and path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256


def refuse_foreign(output: Path) -> None:
    """Raises BadInput unless the folder is new, empty, or holds a bundle: other files would have to be deleted."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInput(f"{output} is a file; choose a folder with --out.")
    found = [path for path in output.iterdir() if not LITTER.fullmatch(path.name)]
    try:
        ours = (output / _WORK).is_dir() or "parts" in json.loads((output / "bundle.json").read_bytes())
    except (OSError, ValueError):
        ours = False
    if found and not ours:
        raise BadInput(
            f"{output} holds other files ({found[0].name} …); choose an empty folder, a new one on the stick."
        )


def _is_litter(path: Path, output: Path) -> bool:
    return any(LITTER.fullmatch(part) for part in path.relative_to(output).parts)
