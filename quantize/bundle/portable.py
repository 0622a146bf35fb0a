"""llama-cpp-python as a wheel that runs on every machine of a platform; the index only has its source."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from quantize.bundle.platforms import Platform
from quantize.errors import BadInput
from quantize.progress import Progress

PACKAGE = "llama-cpp-python"

# llama.cpp's names of instruction sets → /proc/cpuinfo's
_FLAGS = {"AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi"}  # the others differ in case only
_STEP = re.compile(r"\[(\d+)/(\d+)\]")
# Of ARM only what goes beyond the NEON of every 64-bit processor.
_INSTRUCTIONS = re.compile(r"AVX|AMX|FMA|F16C|BMI2|DOTPROD|FP16_VA|MATMUL_INT8|SVE|SME")


def build_command(platform: Platform, version: str) -> str:
    """What to type on a machine of that platform to get the wheel."""
    pip = f"python -m pip wheel --no-deps --no-cache-dir --no-binary {PACKAGE} -w wheels {PACKAGE}=={version}"
    if platform.name.startswith("windows"):
        return f'$env:CMAKE_ARGS = "{platform.cmake}"; {pip}'
    return f'CMAKE_ARGS="{platform.cmake}" {pip}'


def build(platform: Platform, version: str, cache: Path, progress: Progress) -> Path:
    """The portable wheel for this very machine's platform, from the cache or built from source (3 to 10 minutes).

    Raises BadInput when the build fails.
    """
    key = hashlib.sha256(f"{platform.name} {version} {platform.cmake}".encode()).hexdigest()[:12]
    folder = cache / "llama" / key
    if cached := sorted(folder.glob("*.whl")):
        return cached[0]
    folder.mkdir(parents=True, exist_ok=True)
    # With SOURCE_DATE_EPOCH ggml takes the build for a reproducible one and changes its defaults.
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    environment["CMAKE_ARGS"] = platform.cmake
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(dir=folder) as work:
        # Neither a prebuilt wheel nor one from pip's cache will do: pip does not know with which flags they were built.
        command = [
            sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--no-cache-dir", "--no-binary", PACKAGE,
            "-w", work, f"{PACKAGE}=={version}",
        ]  # fmt: skip
        lines: list[str] = []
        with subprocess.Popen(
            command, env={**environment, "TMPDIR": work}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="replace", start_new_session=True,
        ) as pip:  # fmt: skip
            assert pip.stdout is not None
            try:
                for line in pip.stdout:
                    lines.append(line.rstrip())
                    if step := _STEP.search(line):
                        progress("building llama.cpp", int(step[1]), int(step[2]))
            except BaseException:
                _end(pip)
                raise
        if pip.returncode:
            tail = "\n".join(lines[-20:])
            raise BadInput(
                f"{tail}\n{PACKAGE} {version} could not be built. It needs a C/C++ compiler and its source from the "
                "index; or give a portable wheel with --wheels FOLDER."
            )
        wheel = next(Path(work).glob("*.whl"))
        return Path(shutil.move(wheel, folder / wheel.name))


def _end(pip: subprocess.Popen[str]) -> None:
    """Ends pip and the compilers it started, which would go on for minutes."""
    if sys.platform == "win32":
        pip.kill()
    else:
        os.killpg(pip.pid, signal.SIGKILL)


def instruction_sets(wheel: Path) -> set[str]:
    """The instruction sets a wheel for this machine was compiled for, as llama.cpp itself reports them.

    On x86 these are names of /proc/cpuinfo. Raises BadInput when the libraries
    cannot be loaded here. They are loaded in a child process, because a foreign instruction ends the process.
    """
    with tempfile.TemporaryDirectory() as work:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("llama_cpp/lib/")]
            archive.extractall(work, names)
        child = subprocess.run(
            [sys.executable, "-m", "quantize.bundle.portable", str(Path(work) / "llama_cpp/lib")],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, check=False,
        )  # fmt: skip
    if child.returncode:
        raise BadInput(
            f"The libraries of {wheel.name} cannot be loaded on this machine "
            f"({child.stderr.decode('utf-8', 'replace').strip()[-200:] or child.returncode}); build the wheel again."
        )
    found = json.loads(child.stdout)
    return {_FLAGS.get(name) or name.lower() for name in map(str, found) if _INSTRUCTIONS.match(name)}


def _report(folder: Path) -> None:
    """Child process: prints what `llama_print_system_info` lists as present."""
    suffix = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
    prefix = "" if suffix == "dll" else "lib"
    loaded = [
        ctypes.CDLL(str(folder / f"{prefix}{name}.{suffix}"), mode=getattr(ctypes, "RTLD_GLOBAL", 0))
        for name in ("ggml-base", "ggml-cpu", "ggml", "llama")
    ]
    information = loaded[-1].llama_print_system_info
    information.restype = ctypes.c_char_p
    print(json.dumps(re.findall(r"(\w+) = [1-9]", information().decode())))


if __name__ == "__main__":
    _report(Path(sys.argv[1]))
