"""Installs llama-cpp-python at the pinned version and shows how far its build is.

    python scripts/build_llama.py

The package ships as source: pip compiles llama.cpp, some 170 files. A prebuilt wheel that pip can find (PIP_FIND_LINKS,
PIP_EXTRA_INDEX_URL or the pip cache of an earlier build) makes this a matter of seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

_STEP = re.compile(r"\[(\d+)/(\d+)\]")
_LOG = Path(sys.prefix) / "llama-build.log"


def main() -> int:
    """Returns pip's exit code; on failure prints the end of the log and the remedy."""
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("clang") or shutil.which("cl")):
        print("Note: no C compiler was found. If pip finds no prebuilt wheel this will fail; install one first "
              "(Debian/Ubuntu: apt install build-essential; macOS: xcode-select --install).")  # fmt: skip
    print("Installing llama.cpp. Built from source this takes 3 to 8 minutes on two cores, once.")
    print(
        "A prebuilt llama-cpp-python wheel avoids it: put it in a folder and set PIP_FIND_LINKS=FOLDER.",
        flush=True,
    )
    command = [sys.executable, "-m", "pip", "install", "-v", "-c", "constraints.txt", "llama-cpp-python"]
    started = time.monotonic()
    lines: list[str] = []
    with (
        _LOG.open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            log.write(line)
            lines.append(line)
            step = _STEP.search(line)
            if step:
                _show(int(step[1]), int(step[2]), time.monotonic() - started)
    if sys.stdout.isatty():
        print()
    if pip.returncode:
        print("".join(lines[-30:]))
        print(f"llama-cpp-python could not be installed (whole log: {_LOG}). "
              "It needs a C/C++ compiler and a network or a local wheel.")  # fmt: skip
    else:
        print(f"llama.cpp is installed ({time.monotonic() - started:.0f} s).")
    return pip.returncode


def _show(done: int, total: int, seconds: float) -> None:
    """One line that is rewritten on a terminal; a line every tenth elsewhere."""
    text = f"  compiling {done}/{total}  {seconds // 60:.0f}:{seconds % 60:02.0f}"
    if sys.stdout.isatty():
        print(f"\r{text}", end="", flush=True)
    elif done % max(1, total // 10) == 0:
        print(text, flush=True)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\nInterrupted. The same command starts the build again.")
        raise SystemExit(130) from None
    except OSError as error:
        raise SystemExit(f"The build log cannot be written: {error}. Make room on the disk.") from None
