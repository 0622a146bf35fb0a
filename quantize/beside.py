"""A second thread for hashing and for waiting until the disk has something, while the first one computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Beside:
    """Jobs in the order they were started, within a `with`; `given_up` is set when the work beside them failed."""

    def __init__(self) -> None:
        self.given_up = Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.given_up.set()
        self._pool.shutdown(cancel_futures=kind is not None)

    def start(self, job: Callable[..., T], *arguments: object) -> Future[T]:
        """Runs `job(*arguments)` after the jobs before it."""
        return self._pool.submit(job, *arguments)

    def flush(self, file: Path) -> None:
        """Begins to bring a finished file to the disk; a disk that fails says so to whoever flushes it for good."""
        self.start(_flush, file)


def _flush(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("rb+") as written:
        os.fsync(written.fileno())
