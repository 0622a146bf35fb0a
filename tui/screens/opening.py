"""Opening what a consultation needs: the engine's child process and the library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

from tui.consultation import Consultation, Mode, Task
from tui.engine import EngineError, embedded_model
from tui.engine.contract import ModelInfo
from tui.engine.process import Engine
from tui.library import Library


@dataclass(frozen=True)
class Opened:
    """A loaded model and the consultation that talks to it."""

    consultation: Consultation
    model: ModelInfo


class Opener(Protocol):
    """How the app gets its model; tests pass their own."""

    def open(self) -> Opened:
        """Load everything; runs in a worker thread and may take long. Raises EngineError or LibraryError."""
        ...

    def close(self) -> None:
        """Free everything; may be called from any thread, also while `open` is still loading."""
        ...


class ModelOpener:
    """Opens a GGUF file (None: the embedded model) and the cards (None: those that ship with the app).

    `context` is in tokens; `threads` None: the physical cores.
    """

    def __init__(
        self,
        model_path: Path | None,
        task: Task,
        mode: Mode | None,
        *,
        cards: Path | None = None,
        context: int = 2048,
        threads: int | None = None,
    ) -> None:
        self._model_path, self._task, self._mode = model_path, task, mode
        self._cards, self._context, self._threads = cards, context, threads
        self._engine: Engine | None = None
        self._closed = False
        self._lock = Lock()

    def open(self) -> Opened:
        """See `Opener.open`; an engine left from a failed attempt is replaced."""
        path = self._model_path or embedded_model()
        with self._lock:
            if self._closed:
                raise EngineError("程序正在退出。")
            if self._engine is not None:
                self._engine.close()
            engine = self._engine = Engine.start(path, context=self._context, threads=self._threads)
        library = Library.load(self._cards)  # while the child loads the model
        model = engine.wait_ready()
        return Opened(Consultation(engine, library, task=self._task, mode=self._mode), model)

    def close(self) -> None:
        """See `Opener.close`; a waiting `open` then ends with EngineError."""
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
