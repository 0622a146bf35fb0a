"""Writes a bundle onto a stick: resumable, complete or recognisably unfinished, and the same bytes every time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from quantize.bundle.contents import Contents, Item, item
from quantize.bundle.installer import LITTER
from quantize.errors import BadInput
from quantize.progress import Progress
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
    earlier = _named(output)
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
        _publish(items, work, output, earlier)
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


def _publish(items: tuple[Item, ...], work: Path, output: Path, earlier: set[str]) -> None:
    if not _whole(output, items[-1]):
        (output / "SHA256SUMS").unlink(missing_ok=True)
    # Before the new bundle.json has its name: a killed run leaves the old one, which still names these.
    for name in earlier - {entry.name for entry in items}:
        (output / name).unlink(missing_ok=True)
    for entry in items:
        if (work / entry.name).exists():
            (output / entry.name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / entry.name, output / entry.name)
    shutil.rmtree(work, ignore_errors=True)
    for folder in {(output / name).parent for name in earlier} - {output}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _whole(folder: Path, entry: Item) -> bool:
    path = folder / entry.name
    return path.is_file() and path.stat().st_size == entry.bytes and file_sha256(path) == entry.sha256


def refuse_foreign(output: Path) -> None:
    """Raises BadInput when the folder holds files that no bundle put there: the installer would refuse them."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInput(f"{output} is a file; choose a folder with --out.")
    ours = _named(output)
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output)
        litter = any(LITTER.fullmatch(part) for part in name.parts)
        if path.is_dir() or litter or name.parts[0] == _WORK or name.as_posix() in ours:
            continue
        raise BadInput(
            f"{output} holds other files ({name.as_posix()} …); choose an empty folder, a new one on the stick."
        )


def _named(output: Path) -> set[str]:
    """The files that an earlier bundle here, or one that was stopped, put under their names."""
    names: set[str] = set()
    for file in (output / "bundle.json", output / _WORK / "bundle.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            facts = json.loads(file.read_bytes())
            if facts["parts"]:
                names |= {name for name, _ in facts["files"].items() if not {"", ".."} & set(re.split(r"[/\\:]", name))}
    return names | {"bundle.json", "SHA256SUMS"} if names else names
