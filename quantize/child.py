"""llama.cpp in a child process: it aborts on what it does not like, and that must not end the export.

Each child is `python -m quantize.MODULE REQUEST.json`. It prints one JSON object per line: `{"log": …}`,
`{"progress": [done, total]}`, and last `{"answer": …}`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent


class ChildFailed(Exception):
    """The child ended without an answer; the message holds its last words."""


def run(module: str, request: dict[str, Any], folder: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Runs a child to its end and returns its answer. Raises ChildFailed; never leaves the child behind."""
    file = folder / f"{module.rpartition('.')[2]}.json"
    file.write_text(json.dumps(request, ensure_ascii=False), encoding="utf-8")
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUTF8": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    last: deque[str] = deque(maxlen=4)
    answer = None
    # Unread errors go to a file: a full pipe would block the child for ever.
    with tempfile.TemporaryFile(dir=folder) as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    progress(*message["progress"])
                elif "log" in message:
                    last.append(message["log"])
                else:
                    answer = message["answer"]
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if code != 0 or answer is None:
            errors.seek(0)
            words = errors.read().decode("utf-8", "replace").strip().splitlines()[-2:] or list(last)
            raise ChildFailed(f"{_ending(code)}: {' '.join(words) or 'it said nothing'}")
    return answer


def say(**message: Any) -> None:
    """Child side: one message to the parent."""
    print(json.dumps(message, ensure_ascii=False), flush=True)


def child_main(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Child side: reads the request, does the work, answers; ends at once when the parent dies."""
    # The parent decides about Ctrl-C; two processes printing tracebacks help nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    say(answer=work(request))


def redirect_log(llama_cpp: Any, heard: Callable[[str], None]) -> Any:
    """Child side: sends llama.cpp's log lines to `heard`; keep the returned object alive."""

    def callback(_level: int, text: bytes, _data: Any) -> None:
        heard(text.decode("utf-8", "replace"))

    kept = llama_cpp.llama_log_callback(callback)
    llama_cpp.llama_log_set(kept, ctypes.c_void_p(0))
    return kept


def _end_with_parent() -> None:
    # The pipe closes when the parent ends in whatever way, kill -9 included. Not through sys.stdin: its lock,
    # held by this thread, would abort the interpreter when it ends.
    os.read(0, 1)
    os._exit(1)


def _ending(code: int) -> str:
    if code < 0:
        return f"llama.cpp was ended by signal {signal.Signals(-code).name}"
    return f"llama.cpp failed (exit code {code})"
