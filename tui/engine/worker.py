"""The child process: `python -m tui.engine.worker MODEL --context N [--threads N]`.

It reads requests as JSON lines from stdin ({"op": "generate", "id": n, …}, {"op": "stop", "id": n}), writes events as
JSON lines to stdout, and ends when stdin ends, so that it never outlives its parent. llama.cpp's log goes to stderr.
It opens no socket.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tui.engine.contract import EngineError, ModelInfo, Prompts
from tui.engine.header import Header, available_memory, check_memory, read_header

_SAMPLING = {"temp": 0.7, "top_p": 0.8, "top_k": 20}  # for a model that recommends nothing


class _Pipe:
    """Both directions: requests are read by a thread, so that a stop arrives while the model computes."""

    def __init__(self) -> None:
        # Whatever a library prints to stdout must not mix with the events: fd 1 becomes stderr.
        self._out = os.fdopen(os.dup(1), "w", encoding="ascii")
        os.dup2(2, 1)
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.flag: Any = None  # StopFlag, once llama.cpp is imported
        self._lock = threading.Lock()
        self._current = self._stopped = 0
        threading.Thread(target=self._read, daemon=True).start()

    def emit(self, event: Mapping[str, Any]) -> None:
        """Write one event; ends the process when the parent is gone."""
        try:
            self._out.write(json.dumps(event) + "\n")
            self._out.flush()
        except OSError:
            os._exit(0)

    def begin(self, number: int) -> None:
        """Request `number` starts: the stop flag is clear unless it was stopped while it waited."""
        with self._lock:
            self._current = number
            self.flag.set(self._stopped >= number)

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if request["op"] == "stop":
                with self._lock:
                    self._stopped = max(self._stopped, request["id"])
                    if self.flag is not None and self._current <= self._stopped:
                        self.flag.set(True)
            else:
                self.requests.put(request)
        os._exit(0)  # at once, also from the middle of a computation


def main() -> None:
    """Load the model, report it, answer requests until stdin ends."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--context", type=int, required=True)
    arguments.add_argument("--threads", type=int)
    options = arguments.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    pipe = _Pipe()
    try:
        header = read_header(options.model)
        session, info = _load(header, options.context, options.threads, pipe)
    except EngineError as error:
        pipe.emit({"event": "refused", "message": str(error)})
        return
    pipe.emit({"event": "ready", "info": info.to_json()})
    while True:
        request = pipe.requests.get()
        pipe.begin(request["id"])
        session.generate(request, lambda event, number=request["id"]: pipe.emit({**event, "id": number}))


def _load(header: Header, context: int, threads: int | None, pipe: _Pipe) -> tuple[Any, ModelInfo]:
    """Check, load and describe the model; raises EngineError."""
    metadata = header.metadata
    prompts = Prompts.of_metadata(metadata)
    trained = header.number("context_length")
    context = min(context, trained)
    check_memory(header, context, available_memory())
    try:  # after the checks: a wrong file is reported without waiting for the import
        from tui.engine.llama import Model, StopFlag, default_threads
        from tui.engine.session import Session
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"llama-cpp-python 无法载入（{error}），请重新安装：make install。") from error
    threads = threads or default_threads()
    pipe.flag = StopFlag()
    model = Model(header, context, threads, pipe.flag)
    demonstration = bool(metadata.get("pediatricsgpt.demonstration", False))
    sampling = {} if demonstration else _recommended(metadata)
    session = Session(model, metadata["tokenizer.chat_template"], sampling)
    notes = [] if prompts else ["这个模型不带 PediatricsGPT 的提示词，使用内置提示词。"]
    if session.folds_system:
        notes.append("这个模型的对话模板不接受系统提示词，已把它写在第一个问题前面。")
    return session, ModelInfo(
        name=str(metadata.get("general.name") or header.path.stem),
        architecture=header.architecture,
        size_bytes=header.size,
        parameters=model.parameters,
        context=model.context,
        quant=header.quant,
        demonstration=demonstration,
        prompts=prompts or Prompts.builtin(),
        foreign=prompts is None,
        sampling=sampling,
        threads=threads,
        notes=tuple(notes),
    )


def _recommended(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Sampling recommended by the file (general.sampling.*), completed by our defaults."""
    return {name: float(metadata.get(f"general.sampling.{name}", value)) for name, value in _SAMPLING.items()}


if __name__ == "__main__":
    main()
