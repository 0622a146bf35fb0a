"""The whole corridor with real parts: corpus → train → quantize → consult, through the front door."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent.parent
RECIPE = PROJECT / "tests" / "recipes" / "tiny.yaml"
SENTENCES = {"1-cpt", "2-sft", "3-dfpo", "4-mue"}


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pediatricsgpt", *map(str, arguments)]


def _run(*arguments: str | Path, cwd: Path, **kwargs) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUTF8": "1"}
    return subprocess.run(
        _command(*arguments),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **kwargs,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was interrupted once by Ctrl-C in its first stage and then continued."""
    folder = tmp_path_factory.mktemp("work")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    first = subprocess.Popen(
        _command("train", RECIPE), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    metrics = folder / "runs" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    errors = first.communicate(timeout=60)[1]
    assert first.returncode == 130, errors
    assert "continues from the last checkpoint" in errors
    assert not (folder / "runs" / "tiny" / "1-cpt").exists()
    result = _run("train", RECIPE, "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "continuing from checkpoint-" in result.stderr
    return folder


def test_training_leaves_a_complete_run_folder(work: Path) -> None:
    run = work / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} >= {*SENTENCES, "run.json", "prompts.json", "metrics.jsonl", "plots"}
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert list(record["stages"]) == ["cpt", "sft", "dfpo", "mue"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    cpt_steps = [row["step"] for row in rows if row["stage"] == "cpt"]
    assert cpt_steps == sorted(set(cpt_steps)), "a resumed stage must not repeat steps"
    assert (run / "plots" / "loss.png").stat().st_size > 1000
    assert not list(run.rglob("*.part"))


def test_training_again_changes_nothing_and_another_recipe_is_refused(work: Path) -> None:
    weights = work / "runs" / "tiny" / "4-mue" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert _run("train", RECIPE, cwd=work).returncode == 0
    assert weights.stat().st_mtime_ns == before
    other = work / "other.yaml"
    other.write_text(RECIPE.read_text(encoding="utf-8").replace("seed: 1", "seed: 2"), encoding="utf-8")
    result = _run("train", other, cwd=work)
    assert result.returncode == 2
    assert "another recipe" in result.stderr


def test_quantize_then_consult(work: Path) -> None:
    result = _run("quantize", "runs/tiny", "--quant", "Q8_0", "--json", cwd=work)
    assert result.returncode == 0, result.stdout + result.stderr
    model = work / "dist" / "tiny" / "tiny-Q8_0.gguf"
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=model.parent, capture_output=True, check=False)
    assert sums.returncode == 0, sums.stderr
    answer = _run("ask", "手足口病在家怎么护理", "--model", model, "--json", cwd=work)
    assert answer.returncode == 0, answer.stderr
    said = json.loads(answer.stdout)
    assert said["mode"] == "quote"
    assert said["stop_reason"] == "eos"
    cards = (PROJECT / "tui" / "library" / "cards").glob("*.md")
    library = "".join(path.read_text(encoding="utf-8") for path in cards)
    fixed = json.loads((work / "runs" / "tiny" / "prompts.json").read_text(encoding="utf-8"))["phrases"]
    spoken = json.dumps(fixed, ensure_ascii=False)
    for line in said["answer"].splitlines():
        assert line in library or line in spoken or re.fullmatch(r"根据.+·.+\[\d\]：", line), line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "no-such.yaml"], "no recipe"),
        (["quantize", "runs/none"], "runs/none"),
        (["ask", "发热", "--model", "none.gguf"], "none.gguf"),
        (["consultt"], "no command"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path: Path, arguments: list[str], says: str) -> None:
    result = _run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
