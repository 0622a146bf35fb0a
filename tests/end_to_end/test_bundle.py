"""Across the air gap with real parts: bundle → an empty home without any network → install → an answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from installed_wheel import repacked

from quantize.bundle.installer import machine

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
# A network namespace of its own: no interface but an unconfigured loopback.
ISOLATED = ["unshare", "--map-root-user", "--net"]


def _isolation_works() -> bool:
    if sys.platform != "linux" or not shutil.which("unshare"):
        return False
    return subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.skipif(machine() != "linux-x86_64", reason="bundles are made and installed for linux-x86_64 here"),
    pytest.mark.skipif(not _isolation_works(), reason="network namespaces are not allowed here"),
]


@pytest.fixture(scope="module")
def stick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the embedded model with the llama.cpp that is installed here, which saves building it."""
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "wheels").mkdir()
    repacked("llama-cpp-python", folder / "wheels", "py3-none-linux_x86_64")
    arguments = [
        PROJECT / "tui/models/embedded-Q8_0.gguf", "--out", folder / "stick", "--python", PYTHON,
        "--wheels", folder / "wheels", "--native", "--cache", folder / "cache",
    ]  # fmt: skip
    command = [
        sys.executable,
        "-c",
        "import sys; from quantize.commands.bundle import main; sys.exit(main(sys.argv[1:]))",
    ]
    made = subprocess.run(
        [*command, *map(str, arguments)], cwd=PROJECT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if made.returncode == 2 and "could not be downloaded" in made.stderr:
        pytest.skip("no package index is within reach, and a bundle needs the wheels of the dependencies")
    assert made.returncode == 0, made.stderr
    return folder / "stick"


def isolated(home: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command without network, with an empty environment but for a home and the system's Python."""
    home.mkdir(exist_ok=True)
    system = Path(os.path.realpath(sys.executable)).parent
    environment = {"HOME": str(home), "PATH": f"{system}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    return subprocess.run(
        [*ISOLATED, *map(str, command)], env=environment, cwd=home, capture_output=True, text=True, encoding="utf-8",
        timeout=300, check=False,
    )  # fmt: skip


def test_from_the_stick_to_an_answer_without_a_network(stick: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    connect = "import socket; socket.create_connection(('127.0.0.1', 9), 1)"
    assert "unreachable" in isolated(home, sys.executable, "-c", connect).stderr

    installed = isolated(home, "sh", stick / "install.sh")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    asked = isolated(home, home / ".local/bin/pediatricsgpt", "ask", "--json", "手足口病什么时候要送医院？")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["model"] == "embedded"
    assert answer["answer"].strip()
    assert answer["passages"][0]["title"] == "手足口病"
    app = next((home / ".local/share/pediatricsgpt/app").iterdir())
    assert not list(app.glob("lib/python*/site-packages/torch"))
    assert {path.relative_to(home).parts[0] for path in home.rglob("*")} == {".local"}


def test_a_flipped_byte_of_the_real_bundle_is_named(stick: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stick, tmp_path / "stick")
    for name in ("model/embedded-Q8_0.gguf", *(f"wheels/{path.name}" for path in copy.glob("wheels/numpy-*.whl"))):
        with (copy / name).open("r+b") as file:
            file.seek(1_000_000)
            byte = file.read(1)
            file.seek(1_000_000)
            file.write(bytes([byte[0] ^ 0x10]))
        refused = isolated(tmp_path / "home", "sh", copy / "install.sh")
        assert refused.returncode == 2
        assert name in refused.stderr
        assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
        shutil.copyfile(stick / name, copy / name)
