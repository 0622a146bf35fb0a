"""Bundles with a tiny stand-in for the app, so that the real installer can be run in a second or two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from installed_wheel import repacked

from quantize.bundle import contents, installer, texts, write

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
# Answers with its version and the text of its model; a model that says "silent" makes it fail.
APP = """
import json, pathlib, sys

def main(argv):
    model = pathlib.Path(argv[argv.index("--model") + 1]).read_text() if "--model" in argv else "no model"
    if "silent" in model:
        print("the model cannot be loaded", file=sys.stderr)
        return 2
    print(json.dumps({"answer": f"app VERSION, {model}", "passages": [1]}))
    return 0
"""


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: tuple[str, ...] = (),
               tag: str = "py3-none-any") -> Path:  # fmt: skip
    """A wheel that pip installs."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        **files,
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


def make_bundle(folder: Path, scratch: Path, *, app: str | None = "1.0", model: str | None = "model one") -> Path:
    """A bundle at `folder` with an app of that version and a model that says that; None leaves the part out."""
    items, parts = [], []
    if app is not None:
        parts.append("app")
        code = {"pediatricsgpt.py": APP.replace("VERSION", app), "tui/__init__.py": ""}
        wheel = make_wheel(scratch / app, "pediatricsgpt", app, code)
        items += [contents.item(f"wheels/{path.name}", path) for path in (wheel, pip_wheel(scratch))]
    if model is not None:
        parts.append("model")
        items += [contents.item("model/small.gguf", model.encode()), contents.item("model/manifest.json", b"{}")]
    facts: dict[str, Any] = {
        "format": installer.FORMAT,
        "parts": parts,
        "platform": installer.machine(),
        "python": [PYTHON] if app else [],
        "app": {"version": app} if app else None,
        "model": {"name": "small", "file": "small.gguf", "demonstration": True} if model else None,
        "requires": {"cpu": [], "glibc": None, "libraries": []},
        "unpacked_bytes": 1000,
    }
    items += [contents.item(name, data) for name, data in texts.installer_files(facts, 1000).items()]
    items.sort(key=lambda item: item.name)
    write.write(contents.Contents(tuple(items), facts, ()), folder, lambda *_: None)
    return folder


def pip_wheel(scratch: Path) -> Path:
    """The pip that is installed here, as a wheel."""
    found = sorted(scratch.glob("pip-*.whl"))
    return found[0] if found else repacked("pip", scratch)


def run_installer(stick: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sh install.sh` as a user with an empty home would run it, with this Python as the system's."""
    home.mkdir(exist_ok=True)
    return subprocess.run(
        ["sh", str(stick / "install.sh"), *arguments], env=environment(home), capture_output=True, text=True,
        encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    """Nothing of this shell but where Python is."""
    return {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin",
        "LANG": "C.UTF-8",
    }


def answer(home: Path) -> str:
    """What the installed launcher answers."""
    launcher = home / ".local/bin/pediatricsgpt"
    process = subprocess.run(
        [str(launcher), "ask", "-"], env=environment(home), input="", capture_output=True, text=True, check=True
    )
    return json.loads(process.stdout)["answer"]
