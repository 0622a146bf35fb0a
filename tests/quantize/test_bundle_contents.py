"""What is packed: the right wheels for the platform, a verified model, names a stick can hold, the same bytes twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from fake_bundle import PYTHON, make_wheel

from quantize.bundle import contents, installer, platforms, portable, wheels, write
from quantize.commands import bundle
from quantize.errors import BadInput

PROJECT = Path(__file__).resolve().parents[2]
LINUX, WINDOWS, MAC = (platforms.PLATFORMS[name] for name in ("linux-x86_64", "windows-x86_64", "macos-arm64"))


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A distribution folder with the embedded model, as `quantize` writes one."""
    folder = tmp_path / "dist"
    folder.mkdir()
    model = shutil.copy(PROJECT / "tui/models/embedded-Q8_0.gguf", folder / "embedded-Q8_0.gguf")
    data = Path(model).read_bytes()
    outputs = {"embedded-Q8_0.gguf": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    manifest = json.dumps({"name": "embedded", "outputs": outputs}).encode()
    (folder / "manifest.json").write_bytes(manifest)
    sums = {
        "embedded-Q8_0.gguf": outputs["embedded-Q8_0.gguf"]["sha256"],
        "manifest.json": hashlib.sha256(manifest).hexdigest(),
    }
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return folder


def packed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The JSON that a successful `bundle` prints."""
    assert bundle.main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a refused `bundle` says."""
    assert bundle.main([*map(str, arguments)]) == 2
    return " ".join(capsys.readouterr().err.split())


# ---- model and stick ----


def test_a_model_bundle_holds_what_it_says(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = packed(capsys, distribution, "--only", "model", "--out", tmp_path / "stick")
    stick = installer.open_bundle(tmp_path / "stick")
    assert stick.facts["model"]["demonstration"] is True
    assert {entry["name"] for entry in said["files"]} == {*stick.sums, "SHA256SUMS"}
    assert set(stick.part("model")) == {"embedded-Q8_0.gguf", "manifest.json"}
    for name, digest in stick.sums.items():
        assert hashlib.sha256((tmp_path / "stick" / name).read_bytes()).hexdigest() == digest


def test_a_bare_file_is_a_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = PROJECT / "tui/models/embedded-Q8_0.gguf"
    said = packed(capsys, model, "--only", "model", "--out", tmp_path / "stick")
    assert said["model"]["file"] == model.name
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:1000])
    assert "no usable GGUF" in complaint(capsys, broken, "--only", "model", "--out", tmp_path / "other")


def test_a_damaged_distribution_is_not_packed(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (distribution / "embedded-Q8_0.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    text = complaint(capsys, distribution, "--only", "model", "--out", tmp_path / "stick")
    assert "embedded-Q8_0.gguf is not what SHA256SUMS says" in text
    assert not (tmp_path / "stick").exists()


def test_several_models_are_not_chosen_from_silently(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = Path(shutil.copy(distribution / "embedded-Q8_0.gguf", distribution / "embedded-F16.gguf"))
    manifest = json.loads((distribution / "manifest.json").read_text())
    manifest["outputs"][second.name] = manifest["outputs"]["embedded-Q8_0.gguf"]
    data = json.dumps(manifest).encode()
    (distribution / "manifest.json").write_bytes(data)
    digest = manifest["outputs"][second.name]["sha256"]
    sums = {second.name: digest, "embedded-Q8_0.gguf": digest, "manifest.json": hashlib.sha256(data).hexdigest()}
    (distribution / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
    out = ["--only", "model", "--out", tmp_path / "stick"]
    assert "Q8_0 (5 MiB), F16 (5 MiB); choose one with --quant" in complaint(capsys, distribution, *out)
    said = packed(capsys, distribution, "--quant", "F16", *out)
    assert said["model"]["file"] == "embedded-F16.gguf"
    assert not [entry for entry in said["files"] if "Q8_0" in entry["name"]]


def test_writing_again_keeps_what_is_there_and_gives_the_same_bytes(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stick = tmp_path / "stick"
    arguments = (distribution, "--only", "model", "--out", stick)
    packed(capsys, *arguments)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in stick.rglob("*") if path.is_file()}
    (stick / "model/embedded-Q8_0.gguf").unlink()
    (stick / "start.py").write_text("damaged")
    (stick / "wheels").mkdir()
    (stick / "wheels/of-an-earlier-bundle.whl").write_text("old")
    earlier = json.loads((stick / "bundle.json").read_bytes())
    earlier["files"]["wheels/of-an-earlier-bundle.whl"] = {"sha256": "0" * 64, "bytes": 3}
    (stick / "bundle.json").write_text(json.dumps(earlier))
    packed(capsys, *arguments)
    after = {path: (path.stat().st_ino, path.read_bytes()) for path in stick.rglob("*") if path.is_file()}
    assert {path: data for path, (_, data) in after.items()} == {path: data for path, (_, data) in before.items()}
    kept = {path.name for path in before if before[path][0] == after[path][0]}
    assert kept >= {"installer.py", "README.txt", "manifest.json"}
    assert not (stick / "wheels").exists()


def test_a_stopped_bundle_is_refused_by_the_installer_and_continues(
    distribution: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stick = tmp_path / "stick"
    arguments = (distribution, "--only", "model", "--out", stick)
    copy = write._copy

    def stopped(entry: contents.Item, *rest: Any) -> None:
        if entry.name == "start.py":
            raise KeyboardInterrupt
        copy(entry, *rest)

    monkeypatch.setattr(write, "_copy", stopped)
    assert bundle.main([*map(str, arguments)]) == 130
    with pytest.raises(installer.Refused, match="SHA256SUMS is missing"):
        installer.open_bundle(stick)
    written: list[str] = []
    monkeypatch.setattr(write, "_copy", lambda entry, *rest: (written.append(entry.name), copy(entry, *rest)))
    packed(capsys, *arguments)
    assert "model/embedded-Q8_0.gguf" not in written
    assert "start.py" in written
    installer.open_bundle(stick)


def test_other_peoples_files_are_never_deleted(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / "holiday.jpg").write_text("picture")
    assert "holds other files" in complaint(capsys, distribution, "--only", "model", "--out", stick)
    assert [path.name for path in stick.iterdir()] == ["holiday.jpg"]


def test_what_was_added_to_a_bundle_stays_too(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stick = tmp_path / "stick"
    packed(capsys, distribution, "--only", "model", "--out", stick)
    (stick / "photos").mkdir()
    (stick / "photos/holiday.jpg").write_text("picture")
    (stick / "._README.txt").write_text("litter")
    assert "photos/holiday.jpg" in complaint(capsys, distribution, "--only", "model", "--out", stick)
    assert (stick / "photos/holiday.jpg").read_text() == "picture"


def test_a_table_of_contents_cannot_make_us_delete_something_elsewhere(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stick, outside = tmp_path / "stick", tmp_path / "holiday.jpg"
    outside.write_text("picture")
    packed(capsys, distribution, "--only", "model", "--out", stick)
    earlier = json.loads((stick / "bundle.json").read_bytes())
    earlier["files"] |= {name: {} for name in ("../holiday.jpg", str(outside), "model/../../holiday.jpg")}
    (stick / "bundle.json").write_text(json.dumps(earlier))
    packed(capsys, distribution, "--only", "model", "--out", stick)
    assert outside.read_text() == "picture"


def test_a_bundle_killed_while_it_gets_its_names_continues(
    distribution: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stick = tmp_path / "stick"
    arguments = (distribution, "--only", "model", "--out", stick)
    replace = os.replace
    for moved in range(12):
        shutil.rmtree(stick, ignore_errors=True)
        left = [moved]

        def stopped(source: Path, target: Path, left: list[int] = left) -> None:
            if ".part" not in str(target):
                left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stopped)
        ended = bundle.main([*map(str, arguments)])
        monkeypatch.setattr(os, "replace", replace)
        capsys.readouterr()
        assert ended in (0, 130)
        packed(capsys, *arguments)
        installer.open_bundle(stick)
    assert ended == 0


def test_a_small_stick_is_told_before_anything_is_written(
    distribution: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 5, 5))
    text = complaint(capsys, distribution, "--only", "model", "--out", tmp_path / "stick")
    assert "the bundle needs 13 MiB" in text
    assert not list((tmp_path / "stick").iterdir())


def test_a_dry_run_writes_nothing(distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = packed(capsys, distribution, "--only", "model", "--out", tmp_path / "stick", "--dry-run")
    assert {"model/embedded-Q8_0.gguf", "SHA256SUMS"} <= {entry["name"] for entry in said["files"]}
    assert said["output"] is None
    assert not (tmp_path / "stick").exists()


@pytest.mark.parametrize(
    "name", ["a:b.gguf", "what?.gguf", "con.gguf", "LPT1", "dot.", "space ", "line\nbreak", "b\\c", "好" * 256]
)
def test_names_that_fat_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(BadInput, match="cannot hold"):
        contents.refuse_names([(f"model/{name}", 1)])


def test_what_fat_can_hold_passes() -> None:
    contents.refuse_names([("model/Qwen3-1.7B-Q4_K_M.gguf", contents.FAT_FILE_LIMIT), ("说明.txt", 1), ("a+b.whl", 1)])
    with pytest.raises(BadInput, match="the same name"):
        contents.refuse_names([("model/A.gguf", 1), ("model/a.gguf", 1)])
    with pytest.raises(BadInput, match="exFAT"):
        contents.refuse_names([("model/big.gguf", contents.FAT_FILE_LIMIT + 1)])
    contents.refuse_names([("model/big.gguf", contents.FAT_FILE_LIMIT + 1)], large_files=True)


# ---- wheels ----


def test_the_apps_wheel_holds_every_file_of_the_app(tmp_path: Path) -> None:
    first = wheels.app_wheel(tmp_path)
    names = set(zipfile.ZipFile(first).namelist())
    cards = {f"tui/library/cards/{path.name}" for path in (PROJECT / "tui/library/cards").glob("*.md")}
    assert len(cards) > 100
    assert names >= cards | {"tui/app.tcss", "tui/models/embedded-Q8_0.gguf", "tui/engine/default_prompts.json"}
    lacking = tmp_path / "lacking" / first.name
    lacking.parent.mkdir()
    with zipfile.ZipFile(first) as source, zipfile.ZipFile(lacking, "w") as target:
        for name in source.namelist():
            if name != "tui/app.tcss":
                changed = b"---\n" if name == "tui/library/cards/fever.md" else source.read(name)
                target.writestr(name, changed)
    assert wheels.missing_files(lacking) == ["tui/app.tcss", "tui/library/cards/fever.md"]


def test_the_closure_follows_the_targets_markers_not_this_machines(tmp_path: Path) -> None:
    make_wheel(tmp_path, "pediatricsgpt", "1.0", {}, ("colours; sys_platform == 'win32'", "numbers>=2", "text[links]"))
    make_wheel(tmp_path, "numbers", "2.1", {}, tag="cp311-cp311-manylinux_2_28_x86_64")
    make_wheel(tmp_path, "numbers", "2.0", {}, tag="cp311-cp311-win_amd64")
    make_wheel(tmp_path, "text", "1.0", {}, ("linkify; extra == 'links'", "never; extra == 'other'"))
    make_wheel(tmp_path, "linkify", "1.0", {}, ("old; python_version < '3.11'",))
    make_wheel(tmp_path, "unused", "1.0", {})
    found = [wheels.Wheel.read(path) for path in sorted(tmp_path.glob("*.whl"))]

    used, missing = wheels.closure(LINUX, ["3.11"], found, ["pediatricsgpt"])
    assert {(wheel.name, wheel.version) for wheel in used} == {
        ("pediatricsgpt", "1.0"), ("numbers", "2.1"), ("text", "1.0"), ("linkify", "1.0"),
    }  # fmt: skip
    assert not missing
    used, missing = wheels.closure(WINDOWS, ["3.11"], found, ["pediatricsgpt"])
    assert ("numbers", "2.0") in {(wheel.name, wheel.version) for wheel in used}
    assert [need.name for need in missing] == ["colours"]
    assert [need.name for need in wheels.closure(LINUX, ["3.12"], found, ["pediatricsgpt"])[1]] == ["numbers"]
    assert [need.name for need in wheels.closure(MAC, ["3.11"], found, ["pediatricsgpt"])[1]] == ["numbers"]


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("py3-none-any", {"linux-x86_64", "linux-aarch64", "windows-x86_64", "macos-arm64"}),
        ("py3-none-linux_x86_64", {"linux-x86_64"}),
        ("cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64", {"linux-aarch64"}),
        ("cp311-cp311-win_amd64", {"windows-x86_64"}),
        ("cp39-abi3-macosx_11_0_universal2", {"macos-arm64"}),
        ("cp311-cp311-macosx_11_0_x86_64", set()),
        ("cp312-cp312-win_amd64", set()),
        ("cp313-abi3-win_amd64", set()),
        ("cp311-cp311-musllinux_1_2_x86_64", set()),
    ],
)
def test_wheels_go_to_the_platforms_they_are_for(tag: str, fits: set[str], tmp_path: Path) -> None:
    wheel = wheels.Wheel.read(make_wheel(tmp_path, "some", "1.0", {}, tag=tag))
    assert {name for name, platform in platforms.PLATFORMS.items() if wheel.fits(platform, "3.11")} == fits


def test_a_foreign_llama_must_be_given_and_the_way_to_build_it_is_told(
    distribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        distribution,
        "--platform",
        "windows-x86_64",
        "--out",
        tmp_path / "stick",
        "--cache",
        tmp_path / "cache",
    ]
    text = complaint(capsys, *arguments)
    assert "GGML_AVX2=ON" in text
    assert "--wheels" in text
    folder = tmp_path / "wheels"
    make_wheel(folder, "llama_cpp_python", wheels.pinned("llama-cpp-python"), {}, tag="py3-none-linux_x86_64")
    assert "is not for windows-x86_64" in complaint(capsys, *arguments, "--wheels", folder)
    make_wheel(tmp_path / "older", "llama_cpp_python", "0.1.0", {}, tag="py3-none-win_amd64")
    assert "--wheels holds no" in complaint(capsys, *arguments, "--wheels", tmp_path / "older")


def test_a_build_for_one_processor_is_not_passed_off_as_portable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "instruction_sets", lambda _wheel: {"avx", "avx2", "avx512f"})
    with pytest.raises(BadInput, match="avx512f"):
        contents._refuse_native(tmp_path / "llama.whl", LINUX, native=False)
    assert contents._refuse_native(tmp_path / "llama.whl", LINUX, native=True) == {"avx", "avx2", "avx512f"}


BACKEND = """
import os, zipfile
INFO = "llama_cpp_python-9.9.dist-info"
def build_wheel(folder, config_settings=None, metadata_directory=None):
    print("[1/2] compiling", flush=True)
    name = "llama_cpp_python-9.9-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        archive.writestr("flags", f"{os.environ['CMAKE_ARGS']}|{os.environ.get('SOURCE_DATE_EPOCH')}")
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 9.9\\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return name
"""


def test_llama_is_built_from_source_with_the_platforms_flags_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract with pip: --no-binary and --no-cache-dir build from the source, although a wheel would be at hand."""
    source = tmp_path / "llama_cpp_python-9.9"
    source.mkdir()
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 9.9\n")
    (source / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n')
    (source / "b.py").write_text(BACKEND)
    links = tmp_path / "links"
    make_wheel(links, "llama_cpp_python", "9.9", {"flags": "native"})
    with tarfile.open(links / "llama_cpp_python-9.9.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(links)), ("SOURCE_DATE_EPOCH", "1")):
        monkeypatch.setenv(name, value)
    steps: list[tuple[int, int]] = []
    cache = tmp_path / "cache"
    wheel = portable.build(LINUX, "9.9", cache, lambda _label, done, total: steps.append((done, total)))
    assert zipfile.ZipFile(wheel).read("flags").decode() == f"{LINUX.cmake}|None"
    assert steps == [(1, 2)]
    shutil.rmtree(links)
    assert portable.build(LINUX, "9.9", cache, quiet) == wheel
    with pytest.raises(BadInput, match="could not be built"):
        portable.build(LINUX, "9.8", cache, quiet)
    assert [path.name for path in (cache / "llama").rglob("*") if path.is_file()] == [wheel.name]


def test_instruction_sets_come_from_the_library_itself(tmp_path: Path) -> None:
    """Contract: llama_print_system_info lists `NAME = 1`; what was compiled in must run here."""
    from installed_wheel import repacked

    wheel = repacked("llama-cpp-python", tmp_path)
    found = portable.instruction_sets(wheel)
    assert found <= (installer.cpu_flags() or found)
    if installer.machine().endswith("x86_64"):
        assert found
    broken = tmp_path / "broken" / wheel.name
    broken.parent.mkdir()
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("llama_cpp/lib/libllama.so", "no library")
    with pytest.raises(BadInput, match="cannot be loaded"):
        portable.instruction_sets(broken)


def test_a_flipped_bit_in_a_wheel_is_never_a_traceback(tmp_path: Path) -> None:
    plain = make_wheel(
        tmp_path / "plain", "llama_cpp_python", wheels.pinned("llama-cpp-python"), {"llama_cpp/a.py": "x = 1\n" * 99},
        tag="py3-none-linux_x86_64",
    )  # fmt: skip
    wheel = tmp_path / "wheels" / plain.name
    wheel.parent.mkdir()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    whole, found = wheel.read_bytes(), 0
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x11
        wheel.write_bytes(data)
        try:
            wheels.llama_wheel(LINUX, wheel.parent, tmp_path / "cache", True, quiet)
        except BadInput as error:
            found += "is damaged" in str(error)
    assert found > len(whole) / 3  # the others change dates and attributes


def test_needs_are_read_from_the_libraries(tmp_path: Path) -> None:
    library = "\0GLIBC_2.17\0x\0GLIBC_2.34\0libstdc++.so.6\0libgomp.so.1\0libc.so.6\0"
    wheel = make_wheel(tmp_path, "some", "1.0", {"some/libsome.so.1": library, "some/text.py": "\0GLIBC_2.99"})
    assert wheels.system_needs([wheel]) == ("2.34", ["libgomp.so.1", "libstdc++.so.6"])


def test_a_damaged_wheel_in_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = wheels.Wheel.read(make_wheel(tmp_path / "root", "pediatricsgpt", "1.0", {}, ("some",)))
    fetched = []

    def download(_platform: object, _python: str, asked: list[str], _folder: object, store: Path) -> None:
        fetched.append(asked)
        make_wheel(store, "some", "1.0", {"some.py": "x = 1\n" * 100})
        make_wheel(store, "pip", "1.0", {})

    monkeypatch.setattr(wheels, "_download", download)

    def ask() -> list[Path]:
        return wheels.dependencies(LINUX, [PYTHON], [root], None, tmp_path / "cache")

    first = ask()
    assert [path.name.split("-")[0] for path in first] == ["pip", "some"]
    assert ask() == first
    assert len(fetched) == 1
    data = bytearray(first[1].read_bytes())
    data[60] ^= 1
    first[1].write_bytes(data)
    assert ask() == first
    assert len(fetched) == 2


def test_an_index_out_of_reach_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", ""), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    root = wheels.Wheel.read(make_wheel(tmp_path / "root", "pediatricsgpt", "1.0", {}, ("textual",)))
    with pytest.raises(BadInput, match="could not be downloaded"):
        wheels.dependencies(LINUX, ["3.11"], [root], None, tmp_path / "cache")


def test_wrong_use_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Name the model" in complaint(capsys, "--out", tmp_path / "stick")
    assert "There is no" in complaint(capsys, tmp_path / "none", "--out", tmp_path / "stick")
    assert "no Python version" in complaint(capsys, "x", "--out", tmp_path, "--python", "3.9")
