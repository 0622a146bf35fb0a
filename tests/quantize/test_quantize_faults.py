"""What goes wrong while an export runs: full disks, kills, damaged files. Nothing wrong gets a final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from quantize import child, cli, header, limits, publishing, quantizer, writer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.reference._GREEDY_TOKENS", 8)


def flip_one_weight(path: Path, tensor: str) -> None:
    """Changes the exponent of a single stored value."""
    place = header.read(path).tensors[tensor]
    with path.open("r+b") as file:
        file.seek(place.offset + 3)
        byte = file.read(1)[0]
        file.seek(place.offset + 3)
        file.write(bytes([byte ^ 0x01]))


@pytest.mark.parametrize(
    ("broken", "tensor", "gate"),
    [("F32", "blk.0.attn_q.weight", "weights (F32)"), ("Q8_0", "output_norm.weight", "weights (Q8_0)")],
)
def test_one_changed_weight_fails_its_gate(
    broken: str,
    tensor: str,
    gate: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = writer.write

    def write_then_damage(path: Path, *rest: object, **options: object) -> None:
        write(path, *rest, **options)  # type: ignore[arg-type]
        if broken in path.name:
            flip_one_weight(path, tensor)

    monkeypatch.setattr(writer, "write", write_then_damage)
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist"), "--quant", "Q8_0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert gate in report["failed"]
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["fidelity.json"]
    assert json.loads((tmp_path / "dist/fidelity.json").read_text())["failed"] == report["failed"]


def test_a_wrong_eos_fails_its_gate(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = writer.write

    def write_with_other_eos(path: Path, architecture: str, metadata: dict, *rest: object, **options: object) -> None:
        write(path, architecture, {**metadata, "tokenizer.ggml.eos_token_id": 70}, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write", write_with_other_eos)
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist"), "--quant", "F32", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == ["header (F32)", "eos (F32)"]


def test_a_file_that_llama_cpp_aborts_on_fails_the_first_gate(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = writer.write

    def write_repeated_token(path: Path, architecture: str, metadata: dict, *rest: object, **options: object) -> None:
        tokens = list(metadata["tokenizer.ggml.tokens"])
        tokens[300] = tokens[301]
        write(path, architecture, {**metadata, "tokenizer.ggml.tokens": tokens}, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write", write_repeated_token)
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist")]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "opens (F32)" in out
    assert not list((tmp_path / "dist").glob("*.gguf"))


def test_a_failed_export_leaves_an_earlier_one_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "dist"
    arguments = [str(tiny), "--output", str(output), "--quant", "Q8_0"]
    assert cli.main(arguments) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    monkeypatch.setitem(limits._KLD_8B, "Q8_0", 1e-12)
    assert cli.main([*arguments, "--force"]) == 1
    after = {path.name: path.read_bytes() for path in output.iterdir()}
    assert json.loads(after.pop("fidelity-failed.json"))["failed"][1] == "kld_vs_f32 (Q8_0)"
    assert after == before


def test_too_little_disk_is_said_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 5, 5))
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist")]) == 2
    assert "GiB free" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OSError("220665 requested and 21472 written")],
    ids=["error number", "numpy's short write"],
)
def test_disk_full_while_writing(
    error: OSError, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(writer, "encode", full)
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist")]) == 2
    assert "is full" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "dist").exists()


def test_the_quantizers_own_failure_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    target = tmp_path / "out.gguf"
    with pytest.raises(quantizer.BadInput, match="cannot be quantized"):
        quantizer.quantize(tmp_path / "broken.gguf", target, "Q4_K_M", tmp_path, lambda *_: None)
    assert not target.exists()


def test_ctrl_c_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing.os, "replace", interrupted)
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist")]) == 130
    assert "Stopped" in capsys.readouterr().err
    assert not (tmp_path / "dist").exists()


def test_two_exports_into_one_folder(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "dist"
    output.mkdir()
    with FileLock(output / ".quantize.lock"):
        assert cli.main([str(tiny), "--output", str(output)]) == 2
    assert "Another export" in capsys.readouterr().err


def test_kill_9_leaves_no_final_file_and_the_next_run_works(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "dist"
    arguments = [str(tiny), "--output", str(output), "--quant", "Q8_0"]
    # The export is held at the point where a file is half written.
    script = (
        "import sys, time\n"
        "from quantize import cli, writer\n"
        "real = writer.row_blocks\n"
        "def slow(shape):\n"
        "    if len(shape) == 2 and shape[0] > 500: return real(shape)\n"
        "    time.sleep(60)\n"
        "writer.row_blocks = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, stderr=subprocess.DEVNULL)
    try:
        part = output / ".quantize.part/tiny-F32.gguf.part"
        deadline = time.monotonic() + 40
        while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert part.exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not list(output.glob("*.gguf"))
    assert cli.main(arguments) == 0
    assert {path.name for path in output.iterdir()} == {
        "tiny-Q8_0.gguf", "manifest.json", "SHA256SUMS", "fidelity.json", "README.md", "Modelfile",
    }  # fmt: skip


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """A killed export must not leave llama.cpp working on."""
    marker = tmp_path / "pid"
    (tmp_path / "waiting.py").write_text(
        "import os, time\n"
        "from quantize import child\n"
        "def work(request):\n"
        f"    open({str(marker)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "    return {}\n"
        "child.child_main(work)\n"
    )
    outer = (
        "from pathlib import Path\n"
        "from quantize import child\n"
        f"child.run('waiting', {{}}, Path({str(tmp_path)!r}), print)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", outer], env=environment)
    deadline = time.monotonic() + 20
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    pid = int(marker.read_text())
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_childs_last_words_are_kept(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("raise RuntimeError('the reason')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(child.ChildFailed, match="the reason"):
            child.run("failing", {}, tmp_path, lambda *_: None)


def test_damaged_headers_are_refused_never_crashed_on(tiny: Path, tmp_path: Path) -> None:
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist")]) == 0
    data = (tmp_path / "dist/tiny-Q8_0.gguf").read_bytes()
    good = header.read(tmp_path / "dist/tiny-Q8_0.gguf")
    start = min(tensor.offset for tensor in good.tensors.values())
    file = tmp_path / "damaged.gguf"
    random = np.random.default_rng(0)
    for size in [0, 3, 23, *random.integers(24, start, 20), start, len(data) - 33]:
        file.write_bytes(data[: int(size)])
        with pytest.raises(header.Malformed):
            header.read(file)
    for place in random.integers(0, 400, 60):
        broken = bytearray(data)
        broken[place : place + 4] = b"\xff\xff\xff\xff"
        file.write_bytes(broken)
        try:
            header.read(file)
        except header.Malformed:
            continue
