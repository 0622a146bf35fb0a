"""Parent side of the engine: starts the child that runs llama.cpp, talks to it, survives its death."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tui.engine.contract import EngineError, ModelInfo

_STOP_SECONDS = 0.25  # after a stop the caller is free again, whether or not the child has settled
_KILL_SECONDS = 3.0  # a child that has not settled by then is killed and started again
_LOG_LINES = 200
_ROOT = Path(__file__).parents[2]  # the folder that holds the package tui

__all__ = ["Engine", "EngineError", "ModelInfo"]


class _Child:
    """One run of the child process, with threads that drain its pipes."""

    def __init__(self, arguments: list[str]) -> None:
        path = os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH")) if part)
        # Without GGML_NO_BACKTRACE an abort in llama.cpp would start a debugger.
        environment = {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            # -P: a Python file in the current folder must not take the place of a module
            [sys.executable, "-P", "-m", "tui.engine.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=os.name == "posix",  # a Ctrl-C in the terminal is for the parent alone
        )
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.log: collections.deque[str] = collections.deque(maxlen=_LOG_LINES)
        for target, stream in ((self._read_events, self.process.stdout), (self._read_log, self.process.stderr)):
            threading.Thread(target=target, args=(stream,), daemon=True).start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one request; a dead child is noticed by whoever waits for its events."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # ValueError: already closed
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """End the process now and reap it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # the rest of a request cannot be flushed
            self.process.stdin.close()

    def death(self) -> EngineError:
        """Why the child is gone, with the remedy; call when its event stream has ended."""
        code = self.process.wait()
        number = signal.Signals(-code).name if -code in set(signal.Signals) else ""
        if number == "SIGKILL":
            return EngineError("模型进程被系统结束，多半是内存不够；请关闭其他程序或换一个更小的模型，然后重新提问。")
        if number == "SIGILL":
            return EngineError(
                "这台电脑不支持已安装的 llama.cpp（需要 AVX2）；请在本机重新安装（make install），或换用另一个安装包。"
            )
        reason = number or f"退出码 {code}"
        last = next((line for line in reversed(self.log) if line.strip()), "")
        detail = f"：{last.strip()[:120]}" if last else ""
        return EngineError(f"模型进程意外结束（{reason}{detail}）；请重新提问，若反复出现请换一个模型。")

    def _read_events(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.events.put(json.loads(line))
        stream.close()
        self.events.put(None)

    def _read_log(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.log.append(line.decode("utf-8", "replace"))
        stream.close()


class Engine:
    """One model in one child process; when the child dies the next `generate` starts another."""

    def __init__(self, model_path: Path, context: int, threads: int | None) -> None:
        self.model_path = model_path
        self._arguments = [str(model_path), "--context", str(context)]
        if threads:
            self._arguments += ["--threads", str(threads)]
        self._ready_lock = threading.Lock()
        self._number = 0
        self._stop_at: float | None = None  # when a stop was requested for the running generate
        self._generating = False
        self._settling: threading.Thread | None = None  # waits for the end of a stopped or abandoned answer
        self._info: ModelInfo | None = None
        self._failed = False  # this child could not load the model, and that was reported
        self._closed = False
        self._child = _Child(self._arguments)

    @classmethod
    def start(cls, model_path: Path, *, context: int = 2048, threads: int | None = None) -> Engine:
        """Start the child and return at once; the model loads in the child.

        `context` is in tokens (cut to what the model was trained for); `threads` None: the physical cores.
        """
        return cls(Path(model_path), context, threads)

    @property
    def info(self) -> ModelInfo | None:
        """The loaded model, None while loading (never blocks)."""
        return self._info

    @property
    def process_id(self) -> int:
        """The id of the child process."""
        return self._child.process.pid

    def poll_ready(self, seconds: float) -> ModelInfo | None:
        """The loaded model, None when it is still loading after some seconds.

        Raises EngineError when it cannot be loaded; asked again after that, another attempt is made.
        """
        with self._ready_lock:
            if self._failed:
                self._start_again()
            if self._info is None:
                try:
                    event = self._child.events.get(timeout=seconds)
                except queue.Empty:
                    return None
                if event is None or event["event"] == "refused":
                    self._failed = True
                    raise self._child.death() if event is None else EngineError(event["message"])
                self._info = ModelInfo.of_json(event["info"])
            return self._info

    def wait_ready(self, timeout: float = 300.0) -> ModelInfo:
        """Block until the model is loaded; raises EngineError (cause and remedy). Safe from several threads."""
        deadline = time.monotonic() + timeout
        while (info := self.poll_ready(0.05)) is None:
            if time.monotonic() > deadline:
                raise EngineError(f"模型在 {timeout:.0f} 秒内没有载入完，请稍候再试或换一个更小的模型。")
        return info

    def generate(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of one answer (see tui.engine.session); the last one is `finished`.

        Restarts a dead child first. Raises EngineError when the child dies or cannot start. One at a time.
        """
        if self._generating:
            raise EngineError("上一个回答还没有结束，请先停止它。")
        self._generating, self._stop_at = True, None
        finished = True
        try:
            while not self._prepared():
                if self._overdue():
                    yield {"event": "finished", "stop_reason": "stopped"}
                    return
            self._number += 1
            self._child.send({"op": "generate", "id": self._number, **request})
            if self._stop_at is not None:  # stopped while the model was loading
                self.stop()
            finished = False
            for event in self._events(self._child, self._number):
                finished = event["event"] == "finished" and not event.get("unsettled")
                yield event
        finally:
            if not finished and self._child.process.poll() is None:  # abandoned by the caller, or slow to stop
                self._child.send({"op": "stop", "id": self._number})
                self._settling = threading.Thread(target=_settle, args=(self._child, self._number), daemon=True)
                self._settling.start()
            self._generating = False

    def stop(self) -> None:
        """Thread-safe: the running generate ends within 0.3 s with stop_reason "stopped"."""
        if self._generating:
            self._stop_at = self._stop_at or time.monotonic()
            self._child.send({"op": "stop", "id": self._number})

    def close(self) -> None:
        """End the child; no other is started."""
        self._closed = True
        self._child.kill()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _prepared(self) -> bool:
        """Whether a request can be sent now; waits a little, restarts a child that has died since it was ready."""
        if self._settling is not None:
            self._settling.join(0.02)
            if self._settling.is_alive():
                return False
            self._settling = None
        with self._ready_lock:
            if self._info is not None and self._child.process.poll() is not None:
                self._start_again()
        return self.poll_ready(0.02) is not None

    def _start_again(self) -> None:
        """Start another child with the same model; returns at once. The caller holds the lock."""
        if self._closed:
            raise EngineError("模型已经关闭，请重新打开程序。")
        self._child.kill()
        self._child = _Child(self._arguments)
        self._info, self._failed = None, False

    def _overdue(self) -> bool:
        return self._stop_at is not None and time.monotonic() - self._stop_at > _STOP_SECONDS

    def _events(self, child: _Child, number: int) -> Iterator[dict[str, Any]]:
        tokens = 0
        while True:
            try:
                event = child.events.get(timeout=0.02)
            except queue.Empty:
                if self._overdue():
                    yield {"event": "finished", "stop_reason": "stopped", "tokens": tokens, "unsettled": True}
                    return
                continue
            if event is None:
                raise child.death()
            if event.get("id") == number:
                tokens = event.get("tokens", tokens)
                yield event
                if event["event"] == "finished":
                    return


def _settle(child: _Child, number: int) -> None:
    """Wait for the `finished` of a stopped request; kill a child that does not stop in time."""
    deadline = time.monotonic() + _KILL_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        try:
            event = child.events.get(timeout=left)
        except queue.Empty:
            break
        if event is None or (event["event"] == "finished" and event.get("id") == number):
            return
    child.kill()
