"""Installs PediatricsGPT from the folder it lies in, with no network. `sh install.sh --help` shows the options.

Standard library only: it runs with the Python of the system. Everything is checked, copied and tried out beside the
version in use; one rename of the file `current` then switches. What it leaves under the prefix:

    current              two lines: the release in use, the release before it
    release/NAME/        which app with which model; start.py
    app/VERSION-HASH/    a virtual environment
    model/HASH/          a model
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
SAMPLE_QUESTION = "孩子发烧38.5℃，精神还好，在家怎么护理？"
# What systems write onto sticks by themselves. It is never read.
LITTER = re.compile(
    r"(\._.*|\.DS_Store|\.fseventsd|\.Spotlight-V100|\.Trash.*|\.TemporaryItems|System Volume Information"
    r"|\$RECYCLE\.BIN|desktop\.ini|Thumbs\.db|FOUND\.\d+)",
    re.IGNORECASE,
)
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_MARK = "PediatricsGPT launcher"
_LOCK = ".pediatricsgpt.lock"  # stays as long as anything is installed: the sign that what lies beside it is ours
_OURS = ("current", "installer.py", "release", "app", "model", ".part")
_SELF_TEST_SECONDS = 900
_SPARE_BYTES = 64 << 20
_BLOCK = 1 << 20
_DAMAGED, _FAILED, _INTERRUPTED = 2, 1, 130


class Refused(Exception):
    """Nothing was installed. Cause and remedy in Chinese and in English; `code` is the exit code."""

    def __init__(self, chinese: str, english: str, code: int = _DAMAGED) -> None:
        super().__init__(f"{chinese}\n{english}")
        self.code = code


@dataclass(frozen=True)
class Home:
    """Where everything lives: the prefix, the launcher, and the menu entry if there is one."""

    prefix: Path
    launcher: Path
    menu: Path | None

    def releases(self) -> list[str]:
        """The release in use and the one before it; fewer when there are none."""
        try:
            names = (self.prefix / "current").read_text(encoding="utf-8", errors="replace").split()
        except FileNotFoundError:
            return []
        return [name for name in names[:2] if _NAME.fullmatch(name) and self._is_whole(name)]

    def _is_whole(self, name: str) -> bool:
        try:
            return {"app", "model"} <= self.release(name).keys()
        except (OSError, ValueError, AttributeError):
            return False

    def release(self, name: str) -> dict[str, Any]:
        """{"app": folder under app/, "model": path under model/ or None}."""
        return json.loads(self._record(name).read_text(encoding="utf-8"))

    def _record(self, name: str) -> Path:
        return self.prefix / "release" / name / "release.json"

    def python(self, app: str) -> Path:
        """The interpreter of an installed app."""
        return self.prefix / "app" / app / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def switch(self, name: str) -> None:
        """Makes `name` the release in use, in one rename; what was in use becomes the one before."""
        names = [name, *(other for other in self.releases() if other != name)]
        if hasattr(os, "sync"):
            os.sync()  # the release must be on the disk before the pointer to it is
        write(self.prefix / "current", "".join(name + os.linesep for name in names[:2]))  # cmd.exe reads lines by CR LF


@dataclass(frozen=True)
class Bundle:
    """A checked table of contents: sha256 by name, and bundle.json."""

    folder: Path
    sums: dict[str, str]
    facts: dict[str, Any]

    def part(self, top: str) -> dict[str, str]:
        """The files under wheels/ or model/, by name within that folder."""
        return {name[len(top) + 1 :]: digest for name, digest in self.sums.items() if name.startswith(top + "/")}


def main(argv: list[str] | None = None) -> int:
    """Runs one action; returns 0 done, 1 the new version did not answer, 2 refused, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")  # type: ignore[union-attr]
    if sys.version_info < (3, 11):  # noqa: UP036 - it is started by hand, too
        print("需要 Python 3.11 或更新版本。\nPython 3.11 or newer is needed.", file=sys.stderr)
        return _DAMAGED
    options = _parse(argv)
    home = _home(options)
    try:
        if options.status:
            return status(home)
        if not (options.rollback or options.uninstall):
            # The stick is looked at before a single byte is written.
            bundle = open_bundle(Path(__file__).resolve().parent)
            check_machine(bundle.facts)
        with locked(home.prefix):
            if options.rollback:
                return rollback(home)
            if options.uninstall:
                return uninstall(home)
            return install(bundle, home)
    except Refused as refused:
        print(f"\n{_printable(str(refused))}", file=sys.stderr)
        return refused.code
    except OSError as error:
        what = _printable(str(error.filename or home.prefix))
        print(f"\n无法读写：{what}（{error.strerror}）。\n{what} cannot be read or written ({error.strerror}); "
              "check the disk, the stick and the permissions. Nothing was switched.", file=sys.stderr)  # fmt: skip
        return _DAMAGED
    except KeyboardInterrupt:
        print("\n已中断，原有版本不变。\nStopped; what was installed before still works.", file=sys.stderr)
        return _INTERRUPTED


def install(bundle: Bundle, home: Home) -> int:
    """Checks every byte, installs beside the version in use, lets it answer a question, and only then switches."""
    _refuse_foreign_launcher(home)
    current = home.releases()[:1]
    kept = home.release(current[0]) if current else {"app": None, "model": None}
    parts = bundle.facts["parts"]
    app = _app_id(bundle) if "app" in parts else kept["app"]
    if app is None:
        raise Refused("这个更新包只有模型，本机还没有安装程序；请先用完整的安装包。",
                      "This bundle holds only a model and no app is installed; use a full bundle first.")  # fmt: skip
    model = _model_id(bundle) if "model" in parts else None
    _remove_unfinished(home)
    staging = home.prefix / ".part"
    new_app = "app" in parts and not _app_runs(home, app)
    new_model = model is not None and not _model_whole(home.prefix / "model" / model, bundle.part("model"))
    _refuse_full_disk(bundle, home, new_app, new_model)
    wanted = [top for top, new in (("wheels", new_app), ("model", new_model)) if new]
    copy_verified(bundle, staging, [*wanted, "start.py", "installer.py"])
    if new_app:
        _install_app(bundle, home, app, staging / "wheels")
    if new_model and model is not None:
        final = home.prefix / "model" / model
        shutil.rmtree(final, ignore_errors=True)
        final.parent.mkdir(exist_ok=True)
        os.replace(staging / "model", final)
    file = f"{model}/{bundle.facts['model']['file']}" if model else kept["model"]
    name = f"{app}-{model or _own_model(kept)}-{bundle.sums['start.py'][:6]}"
    _write_release(home, name, {"app": app, "model": file}, (staging / "start.py").read_text(encoding="utf-8"))
    say("正在试运行……", "Asking the new version a question …")
    try:
        answer = self_test(home, name)
    except Refused:
        _remove_unused(home)
        raise
    print("".join(f"    {_printable(line)}\n" for line in answer.splitlines()[:2]), end="")
    _write_launcher(home)
    # For --rollback and --uninstall when the stick is no longer at hand.
    write(home.prefix / "installer.py", (staging / "installer.py").read_text(encoding="utf-8"))
    home.switch(name)  # the last thing that can fail
    _remove_unused(home)
    say(f"安装完成，启动命令：{_command(home)}", f"Installed. Start it with: {_command(home)}")
    return 0


def rollback(home: Home) -> int:
    """Goes back to the release before, if it still answers."""
    names = home.releases()
    if len(names) < 2:
        raise Refused("没有可以退回的版本。", "There is no earlier version to go back to.")
    self_test(home, names[1])
    _write_launcher(home)
    home.switch(names[1])
    say(f"已退回：{names[1]}", f"Back to {names[1]}; --rollback again returns to {names[0]}.")
    return 0


def uninstall(home: Home) -> int:
    """Removes what the installer made and nothing else."""
    for path in (home.launcher, home.menu):
        if path is not None and _is_ours(path):
            path.unlink()
    for name in _OURS:
        path = home.prefix / name
        path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    left = sorted(path.name for path in home.prefix.iterdir() if path.name not in (_LOCK, "bin"))
    say("已卸载。", "Uninstalled." + (f" Kept in {home.prefix}: {', '.join(left)}." if left else ""))
    return 0


def status(home: Home) -> int:
    """Prints what is installed."""
    names = home.releases()
    for label, name in zip(("当前 current: ", "上一版 previous:"), names, strict=False):
        print(f"{label} {name}  {json.dumps(home.release(name))}")
    if not names:
        say(f"{home.prefix} 中没有安装。", f"Nothing is installed in {home.prefix}.")
    return 0


# ---- the stick ----


def open_bundle(folder: Path) -> Bundle:
    """Reads SHA256SUMS and bundle.json and compares them with what is there. Raises Refused naming a file."""
    sums = _read_sums(folder / "SHA256SUMS")
    if "bundle.json" not in sums:
        raise _damaged("SHA256SUMS")
    if not (folder / "bundle.json").is_file():
        raise _damaged("bundle.json", "缺失", "is missing")
    data = (folder / "bundle.json").read_bytes()
    if hashlib.sha256(data).hexdigest() != sums["bundle.json"]:
        raise _damaged("bundle.json (SHA256SUMS)")
    facts = json.loads(data)
    if facts["format"] != FORMAT:
        raise Refused("安装包的格式较新，请使用其中自带的 installer.py。",
                      f"The bundle has format {facts['format']}; use the installer.py it came with.")  # fmt: skip
    expected = {name: entry["sha256"] for name, entry in facts["files"].items()}
    if {**sums, "bundle.json": ""} != {**expected, "bundle.json": ""}:
        raise _damaged("SHA256SUMS")
    found = set(_files(folder)) - {"SHA256SUMS"}
    for name in sorted(set(sums) - found):
        raise _damaged(name, "缺失", "is missing")
    for name in sorted(found - set(sums)):
        raise Refused(f"安装包中多出一个文件：{name}。请删除它，或重新拷贝安装包。",
                      f"{name} does not belong to the bundle. Remove it, or copy the bundle again.")  # fmt: skip
    for name, entry in facts["files"].items():
        if (folder / name).stat().st_size != entry["bytes"]:
            raise _damaged(name, "大小不符", "is truncated or too long")
    return Bundle(folder, sums, facts)


def copy_verified(bundle: Bundle, staging: Path, tops: list[str]) -> None:
    """Reads every file of the bundle once, compares its sha256, and copies those under `tops` to `staging`.

    Installing from the copy means that a stick that reads differently the second time cannot do harm.
    """
    total = sum(entry["bytes"] for entry in bundle.facts["files"].values())
    done = 0
    say("正在校验安装包……", "Checking the bundle …")
    for name, expected in bundle.sums.items():
        digest = hashlib.sha256()
        with contextlib.ExitStack() as stack:
            source = stack.enter_context((bundle.folder / name).open("rb"))
            target = None
            if name.split("/")[0] in tops:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                target = stack.enter_context((staging / name).open("wb"))
            while block := _read(source, name):
                digest.update(block)
                if target:
                    target.write(block)
                done += len(block)
                if sys.stdout.isatty():
                    print(f"\r    {min(100, done * 100 // max(total, 1))} %", end="", flush=True)
            if target:
                target.flush()
                os.fsync(target.fileno())
        if digest.hexdigest() != expected:
            shutil.rmtree(staging, ignore_errors=True)
            raise _damaged(name)
    if sys.stdout.isatty():
        print()


def _read(source: BinaryIO, name: str) -> bytes:
    try:
        return source.read(_BLOCK)
    except OSError:  # a failing stick; the error itself does not know the file
        raise _damaged(name, "无法读取", "cannot be read") from None


def _read_sums(file: Path) -> dict[str, str]:
    try:
        *lines, rest = file.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        raise _damaged("SHA256SUMS", "缺失", "is missing") from None
    except UnicodeDecodeError:
        raise _damaged("SHA256SUMS") from None
    if rest:
        raise _damaged("SHA256SUMS")
    sums = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if not match or match[2] in sums or match[2].startswith("/") or {"..", ""} & set(re.split(r"[/\\]", match[2])):
            raise _damaged("SHA256SUMS")
        sums[match[2]] = match[1]
    return sums


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if LITTER.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from (f"{path.name}/{name}" for name in _files(path))
        else:
            yield path.name


def _damaged(name: str, chinese: str = "已损坏", english: str = "is damaged") -> Refused:
    return Refused(
        f"安装包中的文件{chinese}：{name}。没有安装任何东西，请重新拷贝安装包。",
        f"{name} {english}. Nothing was installed; copy the bundle again.",
    )


# ---- the machine ----


def check_machine(facts: dict[str, Any]) -> None:
    """Processor, Python and system libraries against what the bundle needs. Raises Refused with the remedy."""
    if "app" not in facts["parts"]:
        return  # the app that is here already runs here
    here = machine()
    if here != facts["platform"]:
        raise Refused(f"这个安装包适用于 {facts['platform']}，本机是 {here}；请换用相应的安装包。",
                      f"This bundle is for {facts['platform']}, this is {here}; get the one for it.")  # fmt: skip
    flags = cpu_flags()
    missing = set(facts["requires"]["cpu"]) - flags if flags is not None else set()
    if missing:
        names = ", ".join(sorted(missing)).upper()
        raise Refused(f"本机处理器太旧，缺少指令集 {names}，无法运行。",
                      f"This processor lacks {names}, which llama.cpp needs; it cannot run here.")  # fmt: skip
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version not in facts["python"]:
        wanted = " / ".join(facts["python"])
        raise Refused(f"安装包需要 Python {wanted}，当前是 {version}。",
                      f"The bundle holds wheels for Python {wanted}, this is {version}. Start it with that Python, "
                      f"or ask for a bundle made with --python {version}.")  # fmt: skip
    glibc = facts["requires"].get("glibc")
    if glibc:
        library, found = platform.libc_ver()
        if library != "glibc" or _numbers(found) < _numbers(glibc):
            raise Refused(f"系统太旧：需要 glibc {glibc}，当前是 {library or '?'} {found}。",
                          f"glibc {glibc} or newer is needed, this system has {library or 'none'} {found}; "
                          "use a newer system, or ask for a bundle built on an older one.")  # fmt: skip
    for name in facts["requires"]["libraries"]:
        try:
            ctypes.CDLL(name)
        except OSError:
            raise Refused(
                f"系统缺少库 {name}，请用系统的软件包管理器安装。",
                f"The system library {name} is missing; install it with the system's package manager.",
            ) from None


def machine() -> str:
    """This machine as bundles name it: linux-x86_64, linux-aarch64, windows-x86_64, macos-arm64 …"""
    system = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}.get(platform.system(), platform.system())
    kind = platform.machine().lower()
    kind = {"amd64": "x86_64", "arm64": "arm64" if system == "macos" else "aarch64"}.get(kind, kind)
    return f"{system}-{kind if sys.maxsize > 2**32 else '32bit-python'}"


def cpu_flags() -> set[str] | None:
    """Instruction sets of this processor under Linux's names; None where they cannot be found out."""
    if sys.platform == "win32":
        # PF_AVX2_INSTRUCTIONS_AVAILABLE; every processor with AVX2 has the others, too.
        return {"avx", "avx2", "fma", "f16c", "bmi2"} if ctypes.windll.kernel32.IsProcessorFeaturePresent(40) else set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(line[1].split()) if line else None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _refuse_full_disk(bundle: Bundle, home: Home, app: bool, model: bool) -> None:
    sizes = bundle.facts["files"]
    needed = _SPARE_BYTES + (bundle.facts["unpacked_bytes"] if app else 0)
    for top, wanted in (("wheels/", app), ("model/", model)):
        needed += sum(entry["bytes"] for name, entry in sizes.items() if wanted and name.startswith(top))
    free = shutil.disk_usage(home.prefix).free
    if free < needed:
        raise Refused(f"磁盘空间不足：需要 {needed / 2**20:.0f} MiB，剩余 {free / 2**20:.0f} MiB。",
                      f"{home.prefix} has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed; "
                      "free some space or choose another disk with --prefix.")  # fmt: skip


# ---- app, model, release ----


def _app_id(bundle: Bundle) -> str:
    """Version, and a hash over the wheels and the interpreter that the environment is made with."""
    base = f"{sys.version_info[:2]} {os.path.realpath(sys.executable)}"
    return f"{bundle.facts['app']['version']}-{_hash([base, *sorted(bundle.part('wheels').values())])}"


def _model_id(bundle: Bundle) -> str:
    return _hash(f"{digest} {name}" for name, digest in sorted(bundle.part("model").items()))


def _own_model(kept: dict[str, Any]) -> str:
    return str(kept["model"]).split("/")[0] if kept["model"] else "embedded"


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _app_runs(home: Home, app: str) -> bool:
    """Whether this very app is installed whole, and its interpreter still starts."""
    if not (home.prefix / "app" / app / "complete").is_file():
        return False
    try:
        command = [str(home.python(app)), "-I", "-c", "import tui"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _model_whole(folder: Path, sums: dict[str, str]) -> bool:
    return all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in sums.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _install_app(bundle: Bundle, home: Home, app: str, wheels: Path) -> None:
    say("正在安装程序……", "Installing the app …")
    folder = home.prefix / "app" / app
    try:
        import venv
    except ImportError:
        raise Refused(
            "系统的 Python 缺少 venv 模块（Debian/Ubuntu：sudo apt install python3-venv）。",
            "This Python has no venv module (Debian/Ubuntu: sudo apt install python3-venv).",
        ) from None
    # Without pip: Debian splits ensurepip off. The pip of the bundle runs from its wheel.
    venv.EnvBuilder(clear=True, symlinks=os.name != "nt").create(folder)
    pip = next(wheels.glob("pip-*.whl"))
    environment = {name: value for name, value in _environment().items() if not name.startswith("PIP_")}
    process = subprocess.run(
        [
            str(home.python(app)), str(pip / "pip"), "install", "--quiet", "--disable-pip-version-check",
            "--no-cache-dir", "--no-index", "--find-links", str(wheels),
            f"pediatricsgpt=={bundle.facts['app']['version']}",
        ],
        env={**environment, "PIP_CONFIG_FILE": os.devnull},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    if process.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise Refused("程序安装失败，原有版本不变。",
                      "pip could not install the app; what was installed before still works.\n"
                      + "\n".join(process.stdout.splitlines()[-10:]), _FAILED)  # fmt: skip
    write(folder / "complete", "")


def _write_release(home: Home, name: str, record: dict[str, Any], start_py: str) -> None:
    folder = home.prefix / "release" / name
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "release.json", json.dumps(record) + "\n")
    write(folder / "start.py", start_py)
    python, start = home.python(record["app"]), folder / "start.py"
    if os.name == "nt":
        # Relative, because cmd.exe reads scripts in the code page of the system: a user's name may be Chinese.
        script = rf'@"%~dp0..\..\app\{record["app"]}\Scripts\python.exe" -I "%~dp0start.py" %*'
        write(folder / "start.cmd", script + "\r\n")
    else:
        write(folder / "start", f'exec {shlex.quote(str(python))} -I {shlex.quote(str(start))} "$@"\n')


def self_test(home: Home, name: str) -> str:
    """The answer of a release to the sample question. Raises Refused when there is none."""
    command = [home.python(home.release(name)["app"]), "-I", home.prefix / "release" / name / "start.py"]
    reason = ""
    try:
        process = subprocess.run(
            [*map(str, command), "ask", "--json", "-"],
            input=SAMPLE_QUESTION.encode(), capture_output=True, env=_environment(), timeout=_SELF_TEST_SECONDS,
            check=False,
        )  # fmt: skip
        reason = process.stderr.decode("utf-8", "replace").strip()[-500:]
        answer = json.loads(process.stdout) if process.returncode == 0 else {}
        if answer.get("answer", "").strip() and answer.get("passages") and not answer.get("error"):
            return answer["answer"].strip()
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        reason = str(error)
    raise Refused("这个版本没有通过试运行，没有启用；原有版本不变。",
                  f"This version did not answer, it is not used; what was installed before is unchanged.\n{reason}",
                  _FAILED)  # fmt: skip


def _environment() -> dict[str, str]:
    """Variables of another Python must not reach this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


# ---- launcher and cleaning ----


def _write_launcher(home: Home) -> None:
    if os.name == "nt":
        text = (
            f'@rem {_MARK}\r\n@set /p RELEASE=<"%~dp0..\\current"\r\n'
            '@call "%~dp0..\\release\\%RELEASE%\\start.cmd" %*\r\n'
        )
        entry = (
            f'@rem {_MARK}\r\n@call "%LOCALAPPDATA%\\pediatricsgpt\\bin\\{home.launcher.name}"\r\n'
            "@if errorlevel 1 pause\r\n"
        )
    else:
        prefix = shlex.quote(str(home.prefix))
        text = (
            f"#!/bin/sh\n# {_MARK}\nread -r release < {prefix}/current\n"
            f'exec sh {prefix}/release/"$release"/start "$@"\n'
        )
        entry = (
            f"[Desktop Entry]\n# {_MARK}\nType=Application\nName=PediatricsGPT 儿科助手\n"
            f'Exec="{home.launcher}"\nTerminal=true\nCategories=Science;MedicalSoftware;\n'
        )
    home.launcher.parent.mkdir(parents=True, exist_ok=True)
    write(home.launcher, text, executable=True)
    if home.menu is not None and (_is_ours(home.menu) or not home.menu.exists()):
        home.menu.parent.mkdir(parents=True, exist_ok=True)
        write(home.menu, entry)


def _refuse_foreign_launcher(home: Home) -> None:
    if home.launcher.exists() and not _is_ours(home.launcher):
        raise Refused(f"{home.launcher} 已存在，且不是本安装程序创建的；请先移走它。",
                      f"{home.launcher} exists and was not made by this installer; move it away first.")  # fmt: skip


def _is_ours(path: Path) -> bool:
    return path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace")


def _command(home: Home) -> str:
    on_path = str(home.launcher.parent) in os.environ.get("PATH", "").split(os.pathsep)
    return home.launcher.stem if on_path else str(home.launcher)


def _remove_unfinished(home: Home) -> None:
    """What an interrupted installation left."""
    shutil.rmtree(home.prefix / ".part", ignore_errors=True)
    for folder in _children(home.prefix / "app"):
        if not (folder / "complete").is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_unused(home: Home) -> None:
    """Whatever neither the release in use nor the one before it needs."""
    names = home.releases()
    releases = [home.release(name) for name in names]
    used = {
        "release": set(names),
        "app": {release["app"] for release in releases},
        "model": {_own_model(release) for release in releases},
    }
    for top, keep in used.items():
        for folder in _children(home.prefix / top):
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def write(path: Path, text: str, executable: bool = False) -> None:
    """A whole file under its name, or none."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if executable:
        part.chmod(0o755)
    os.replace(part, path)


@contextlib.contextmanager
def locked(prefix: Path) -> Iterator[None]:
    """One installer at a time; the lock ends with the process, also when it is killed.

    Raises Refused for a folder with an app/, model/ … of somebody else: they would be cleaned away.
    """
    foreign = [] if (prefix / _LOCK).exists() else [name for name in _OURS if (prefix / name).exists()]
    if foreign:
        raise Refused(
            f"{prefix} 中已有其他文件（{foreign[0]}）；请用 --prefix 另选一个空文件夹。",
            f"{prefix / foreign[0]} was not made by this installer; choose an empty folder with --prefix.",
        )
    prefix.mkdir(parents=True, exist_ok=True)
    file = (prefix / _LOCK).open("w")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise Refused("另一个安装程序正在运行。", "Another installer is running; wait for it to end.") from None
    try:
        yield
    finally:
        shutil.rmtree(prefix / ".part", ignore_errors=True)
        file.close()
        if not (prefix / "current").exists():  # nothing was installed, or it was removed
            _remove_empty(*(prefix / name for name in ("app", "model", "release", "bin")))
            if not any((prefix / name).exists() for name in _OURS):
                (prefix / _LOCK).unlink(missing_ok=True)
            _remove_empty(prefix)


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


def say(chinese: str, english: str) -> None:
    """One step, in both languages."""
    print(f"{chinese}\n    {english}", flush=True)


def _printable(text: str) -> str:
    """Names on the stick and answers of a model must not send escape sequences to the terminal."""
    return "".join(character for character in text if character.isprintable() or character == "\n")


def _home(options: argparse.Namespace) -> Home:
    name = "pediatricsgpt.cmd" if os.name == "nt" else "pediatricsgpt"
    if options.prefix:
        prefix = options.prefix.expanduser().resolve()
        return Home(prefix, prefix / "bin" / name, None)
    if os.name == "nt":
        prefix = Path(os.environ["LOCALAPPDATA"]) / "pediatricsgpt"
        menu = Path(os.environ["APPDATA"]) / "Microsoft/Windows/Start Menu/Programs/PediatricsGPT.cmd"
        return Home(prefix, prefix / "bin" / name, menu)
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    menu = data / "applications/pediatricsgpt.desktop" if sys.platform == "linux" else None
    return Home(data / "pediatricsgpt", Path.home() / ".local/bin" / name, menu)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="install.sh",
        description="Install PediatricsGPT from this folder, without a network. A later bundle updates it.",
    )
    parser.add_argument("--prefix", type=Path, metavar="DIR", help="install everything, the launcher too, under DIR")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--status", action="store_true", help="show what is installed")
    action.add_argument("--rollback", action="store_true", help="go back to the version before")
    action.add_argument("--uninstall", action="store_true", help="remove app and models; other files are kept")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
