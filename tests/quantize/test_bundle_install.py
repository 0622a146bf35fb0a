"""The installer on the stick: nothing damaged is installed, and what works stays until something newer answers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from fake_bundle import PYTHON, answer, environment, make_bundle, run_installer

from quantize.bundle import installer, start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="runs install.sh")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels that several bundles share."""
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> Path:
    """App 1.0 with `model one`. Read only."""
    return make_bundle(tmp_path_factory.mktemp("good") / "stick", scratch)


@pytest.fixture
def stick(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(good, tmp_path / "stick")


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x01
    path.write_bytes(data)


def refused(stick: Path, home: Path, name: str) -> None:
    """The installer names the file, and no file is in the home."""
    result = run_installer(stick, home)
    assert result.returncode == 2, result.stdout + result.stderr
    assert name in result.stderr
    assert "Nothing was installed" in result.stderr or "does not belong" in result.stderr
    assert not [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "name",
    [
        "wheels/pediatricsgpt-1.0-py3-none-any.whl",
        "model/small.gguf",
        "model/manifest.json",
        "bundle.json",
        "SHA256SUMS",
        "installer.py",
        "start.py",
        "README.txt",
        "说明.txt",
    ],
)
@pytest.mark.parametrize("where", [0.0, 0.999])
def test_a_flipped_byte_is_refused_by_name(name: str, where: float, stick: Path, tmp_path: Path) -> None:
    flip(stick / name, int((stick / name).stat().st_size * where))
    refused(stick, tmp_path / "home", name)


def test_a_flipped_byte_in_the_script_itself_installs_nothing(good: Path, tmp_path: Path) -> None:
    size = (good / "install.sh").stat().st_size
    for place in range(0, size, size // 12):
        stick = shutil.copytree(good, tmp_path / f"stick-{place}")
        flip(stick / "install.sh", place)
        result = run_installer(stick, tmp_path / "home", "--prefix", str(tmp_path / "prefix"))
        assert result.returncode != 0, place
        assert not (tmp_path / "prefix").exists(), place


def test_every_line_of_the_checksums_is_guarded(good: Path, tmp_path: Path) -> None:
    stick = shutil.copytree(good, tmp_path / "stick")
    lines = (good / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    for number in range(len(lines)):
        kept = lines[:number] + lines[number + 1 :]
        (stick / "SHA256SUMS").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        with pytest.raises(installer.Refused, match="SHA256SUMS"):
            installer.open_bundle(stick)


@pytest.mark.parametrize(
    "name", ["model/small.gguf", "bundle.json", "SHA256SUMS", "wheels/pediatricsgpt-1.0-py3-none-any.whl"]
)
def test_a_missing_file_is_named(name: str, stick: Path, tmp_path: Path) -> None:
    (stick / name).unlink()
    refused(stick, tmp_path / "home", name)


def test_a_truncated_file_is_named(stick: Path, tmp_path: Path) -> None:
    wheel = stick / "wheels/pediatricsgpt-1.0-py3-none-any.whl"
    os.truncate(wheel, wheel.stat().st_size // 2)
    refused(stick, tmp_path / "home", wheel.name)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file at hand that cannot be read")
def test_a_file_that_the_stick_cannot_read_is_named(stick: Path, tmp_path: Path) -> None:
    bundle = installer.open_bundle(stick)
    (stick / "model/small.gguf").unlink()
    (stick / "model/small.gguf").symlink_to("/proc/self/mem")  # its first bytes are an I/O error
    with pytest.raises(installer.Refused, match=r"model/small\.gguf cannot be read"):
        installer.copy_verified(bundle, tmp_path / "staging", ["model"])


def test_an_extra_file_is_named_but_what_systems_write_is_not(stick: Path, tmp_path: Path) -> None:
    for name in (".DS_Store", "wheels/._numpy.whl", "System Volume Information/IndexerVolumeGuid", ".Trash-1000/x"):
        (stick / name).parent.mkdir(exist_ok=True)
        (stick / name).write_bytes(b"x")
    installer.open_bundle(stick)
    (stick / "wheels/extra\x1b[31m-1.0-py3-none-any.whl").write_bytes(b"x")
    refused(stick, tmp_path / "home", "extra[31m-1.0-py3-none-any.whl")


def test_names_that_lead_out_of_the_stick_are_refused(stick: Path) -> None:
    for name in ("../outside", "/etc/passwd", "wheels/../../outside", "a\\..\\b"):
        (stick / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n", encoding="utf-8")
        with pytest.raises(installer.Refused, match="SHA256SUMS"):
            installer.open_bundle(stick)


def test_a_life_of_updates(good: Path, scratch: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run_installer(good, home).returncode == 0
    assert answer(home) == "app 1.0, model one"
    prefix = home / ".local/share/pediatricsgpt"

    broken = make_bundle(tmp_path / "broken", scratch, app="2.0", model="silent")
    result = run_installer(broken, home)
    assert result.returncode == 1
    assert "the model cannot be loaded" in result.stderr
    assert answer(home) == "app 1.0, model one"
    assert len(list((prefix / "app").iterdir())) == len(list((prefix / "model").iterdir())) == 1

    model_only = make_bundle(tmp_path / "model", scratch, app=None, model="model two")
    assert run_installer(model_only, home).returncode == 0
    assert answer(home) == "app 1.0, model two"
    app_only = make_bundle(tmp_path / "app", scratch, app="2.0", model=None)
    assert run_installer(app_only, home).returncode == 0
    assert answer(home) == "app 2.0, model two"
    # `model one` belongs to neither the release in use nor the one before it.
    assert len(list((prefix / "app").iterdir())) == 2
    assert len(list((prefix / "model").iterdir())) == len(list((prefix / "release").iterdir())) - 1 == 1

    alone = [sys.executable, str(prefix / "installer.py")]
    for expected in ("app 1.0, model two", "app 2.0, model two"):
        subprocess.run([*alone, "--rollback"], env=environment(home), check=True, capture_output=True)
        assert answer(home) == expected

    (prefix / "records.db").write_text("of a patient")
    subprocess.run([*alone, "--uninstall"], env=environment(home), check=True, capture_output=True)
    left = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    assert left == [".local/share/pediatricsgpt/records.db"]


def test_a_model_alone_needs_an_app(scratch: Path, tmp_path: Path) -> None:
    stick = make_bundle(tmp_path / "stick", scratch, app=None)
    result = run_installer(stick, tmp_path / "home")
    assert result.returncode == 2
    assert "use a full bundle first" in result.stderr
    assert not list(tmp_path.joinpath("home").rglob("*.gguf"))


KILL = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("installer", sys.argv[1] + "/installer.py")
installer = importlib.util.module_from_spec(spec)
sys.modules["installer"] = installer
spec.loader.exec_module(installer)
owner, name, condition = installer.Home if sys.argv[2] == "switch" else installer, sys.argv[2], sys.argv[3]
real = getattr(owner, name)
def killed(*arguments, **options):
    if condition in repr(arguments):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(owner, name, killed)
sys.exit(installer.main([]))
"""


def test_kill_9_anywhere_leaves_the_old_one_working_and_a_rerun_finishes(
    good: Path, scratch: Path, tmp_path: Path
) -> None:
    home, newer = tmp_path / "home", make_bundle(tmp_path / "newer", scratch, app="2.0", model="model two")
    assert run_installer(good, home).returncode == 0
    points = [
        ("_install_app", ""),  # everything is copied
        ("write", "/complete'"),  # the environment is filled, but not marked as complete
        ("_write_release", ""),  # app and model have their names
        ("self_test", ""),
        ("_write_launcher", ""),
        ("switch", ""),
        ("write", "/current'"),
    ]
    for name, condition in points:
        command = [sys.executable, "-B", "-c", KILL, str(newer), name, condition]
        process = subprocess.run(command, env=environment(home), capture_output=True, check=False)
        assert process.returncode == -signal.SIGKILL, (name, process.stderr)
        assert answer(home) == "app 1.0, model one", name
    command = [sys.executable, "-B", "-c", KILL, str(newer), "_remove_unused", ""]
    assert subprocess.run(command, env=environment(home), capture_output=True, check=False).returncode < 0
    assert answer(home) == "app 2.0, model two"  # killed after the switch
    assert run_installer(newer, home).returncode == 0
    assert answer(home) == "app 2.0, model two"
    assert run_installer(newer, home, "--rollback").returncode == 0
    assert answer(home) == "app 1.0, model one"


@pytest.mark.parametrize("action", [[], ["--uninstall"]])
@pytest.mark.parametrize("name", ["app/mine/main.c", "model/mine.gguf", "release/1.0/notes", "current"])
def test_a_folder_of_somebody_elses_is_left_alone(action: list[str], name: str, stick: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "work"
    (prefix / name).parent.mkdir(parents=True)
    (prefix / name).write_text("mine")
    result = run_installer(stick, tmp_path / "home", "--prefix", str(prefix), *action)
    assert result.returncode == 2
    assert "was not made by this installer" in result.stderr
    assert [path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if path.is_file()] == [name]


def test_a_launcher_that_cannot_be_written_switches_nothing(good: Path, scratch: Path, tmp_path: Path) -> None:
    home, newer = tmp_path / "home", make_bundle(tmp_path / "newer", scratch, app="2.0")
    assert run_installer(good, home).returncode == 0
    (home / ".local/bin/pediatricsgpt.part").mkdir()
    result = run_installer(newer, home)
    assert result.returncode == 2
    assert "Nothing was switched" in result.stderr
    assert answer(home) == "app 1.0, model one"


@pytest.mark.parametrize("damage", [b"", b"[]", b"\xff\xfe"])
def test_a_damaged_installation_is_replaced(damage: bytes, good: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    prefix = home / ".local/share/pediatricsgpt"
    for pattern in ("release/*/release.json", "current"):
        assert run_installer(good, home).returncode == 0
        next(prefix.glob(pattern)).write_bytes(damage)
        result = run_installer(good, home)
        assert result.returncode == 0, result.stderr
        assert answer(home) == "app 1.0, model one"


def test_windows_scripts_name_no_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cmd.exe reads them in the code page of the system, and a user may be called 张."""
    prefix = tmp_path / "张/pediatricsgpt"
    home = installer.Home(prefix, prefix / "bin/pediatricsgpt.cmd", tmp_path / "张/menu/PediatricsGPT.cmd")
    with monkeypatch.context() as patch:
        patch.setattr(installer.os, "name", "nt")
        installer._write_release(home, "1.0-a-b", {"app": "1.0-a", "model": "m/small.gguf"}, "")
        installer._write_launcher(home)
    for script in (home.launcher, home.menu, prefix / "release/1.0-a-b/start.cmd"):
        assert script is not None
        assert script.read_bytes().isascii()
    assert b"%~dp0..\\..\\app\\1.0-a\\Scripts" in (prefix / "release/1.0-a-b/start.cmd").read_bytes()


def test_two_installers_at_once(stick: Path, tmp_path: Path) -> None:
    with installer.locked(tmp_path / "prefix"):
        result = run_installer(stick, tmp_path / "home", "--prefix", str(tmp_path / "prefix"))
    assert result.returncode == 2
    assert "Another installer" in result.stderr


def test_a_program_of_the_same_name_is_left_alone(stick: Path, tmp_path: Path) -> None:
    launcher = tmp_path / "home/.local/bin/pediatricsgpt"
    launcher.parent.mkdir(parents=True)
    launcher.write_text("somebody else's")
    result = run_installer(stick, tmp_path / "home")
    assert result.returncode == 2
    assert "move it away" in result.stderr
    assert launcher.read_text() == "somebody else's"


def facts(**changes: object) -> dict[str, object]:
    needs = {"cpu": ["avx2"], "glibc": "2.17", "libraries": []}
    return {"parts": ["app"], "platform": installer.machine(), "python": [PYTHON], "requires": needs, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "windows-x86_64"}, "for windows-x86_64"),
        ({"python": ["3.99"]}, "--python"),
        ({"requires": {"cpu": [], "glibc": "9.99", "libraries": []}}, "newer system"),
        ({"requires": {"cpu": [], "glibc": None, "libraries": ["libnone.so.9"]}}, "libnone.so.9"),
    ],
)
def test_an_unsuitable_machine_is_told_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(installer.Refused, match=message):
        installer.check_machine(facts(**changes))


def test_a_processor_without_avx2_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "cpu_flags", lambda: {"sse4_2", "avx"})
    with pytest.raises(installer.Refused, match="AVX2"):
        installer.check_machine(facts())
    monkeypatch.setattr(installer, "cpu_flags", lambda: set())
    with pytest.raises(installer.Refused, match="AVX2"):
        installer.check_machine(facts())
    for flags in ({"avx", "avx2"}, None):  # None: the system does not tell
        monkeypatch.setattr(installer, "cpu_flags", lambda flags=flags: flags)
        installer.check_machine(facts())


def test_too_small_a_disk_is_said_before_anything_is_copied(
    stick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 5, 5))
    prefix = tmp_path / "prefix"
    home = installer.Home(prefix, prefix / "bin/pediatricsgpt", None)
    with pytest.raises(installer.Refused, match="MiB are needed"), installer.locked(prefix):
        installer.install(installer.open_bundle(stick), home)
    assert not prefix.exists()


def test_without_a_suitable_python_the_script_says_what_to_install(good: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [shutil.which("sh") or "sh", str(good / "install.sh")], env={"PATH": str(tmp_path)}, capture_output=True,
        text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "apt install python3" in result.stderr


@pytest.mark.parametrize(
    ("typed", "passed"),
    [
        ([], ["consult", "--model", "M"]),
        (["--ascii"], ["consult", "--model", "M", "--ascii"]),
        (["ask", "x", "--model", "other"], ["ask", "--model", "M", "x", "--model", "other"]),
        (["--help"], ["--help"]),
        (["--version"], ["--version"]),
        (["recipes"], ["recipes"]),
    ],
)
def test_the_launcher_adds_the_model_where_one_is_used(typed: list[str], passed: list[str]) -> None:
    assert start.arguments(typed, "M") == passed
    assert start.arguments(typed, None) == typed
