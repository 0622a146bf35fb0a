"""The files of a batch: questions as checked JSON lines, answers in a file that has its name only when complete."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tui.consultation import Mode, Task, sanitised

_KEYS = {"question", "id", "task", "mode", "history"}


class InputError(Exception):
    """The input cannot be used; the message is one sentence with the remedy."""


def batch_lines(name: str) -> Iterator[dict[str, Any]]:
    """The checked lines of a batch; raises InputError with the line number."""
    where = "standard input" if name == "-" else name
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}); check the path.") from error
    for number, text in enumerate(decoded(raw, where).split("\n"), 1):
        if text.strip():
            yield _checked(text, f"{where} line {number}")


def _checked(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        json.dumps(line, ensure_ascii=False, allow_nan=False).encode()  # what cannot be written back is refused now
    except (ValueError, RecursionError) as error:
        cause = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where} is not JSON ({cause}); write one object per line.") from error
    if not isinstance(line, dict) or not _has_text(line.get("question")):
        raise InputError(f'{where} needs a "question" with text.')
    if unknown := sorted(set(line) - _KEYS):
        raise InputError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}.")
    if not isinstance(line.get("id"), str | int | float | None):
        raise InputError(f'{where}: "id" is a text or a number.')
    history = line.get("history", [])
    if not isinstance(history, list) or not all(map(_has_text, history)):
        raise InputError(f'{where}: "history" is a list of earlier questions.')
    for key, values in (("task", Task), ("mode", Mode)):
        if key in line and line[key] not in list(values):
            raise InputError(f'{where}: "{key}" is one of {", ".join(values)}, not {line[key]!r}.')
    return line


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and bool(sanitised(value).strip())


def decoded(raw: bytes, where: str) -> str:
    """The text of UTF-8 bytes; raises InputError that says `where` they are not."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            f"{where} is not UTF-8 (line {line}); convert it, for instance: iconv -f GB18030 -t UTF-8."
        ) from error


@contextmanager
def output(path: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that gets its name only when it is complete; else its .part is kept and named."""
    if path is None:
        yield sys.stdout
        return
    part = Path(f"{path}.part")
    if part.exists():
        raise InputError(f"{part} holds the answers of an interrupted run; move it away or delete it first.")
    try:
        with part.open("w", encoding="utf-8") as stream:
            yield stream
        os.replace(part, path)
    except BaseException as error:
        if kept := _lines(part):
            message = f"{path} is not complete; the first {kept} answers are in {part}."
            print(f"pediatricsgpt: {sanitised(message)}", file=sys.stderr)
        if isinstance(error, OSError):
            raise InputError(f"{path} cannot be written ({error.strerror}); check folder and disk space.") from error
        raise


def _lines(part: Path) -> int:
    """The number of whole lines of an unfinished file; without any it is removed."""
    try:
        lines = part.read_bytes().count(b"\n")
        if not lines:
            part.unlink()
        return lines
    except OSError:  # it was never there
        return 0
