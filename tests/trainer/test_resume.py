"""kill -9 in each of the four stages, and a checkpoint damaged: the weights are those of a run left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainer.recipe import PROJECT
from trainer.stages.checkpoints import read_metrics, step_of

RECIPE = PROJECT / "tests" / "recipes" / "tiny.yaml"
STAGES = ["cpt", "sft", "dfpo", "mue"]
# Two passes each, so that a stage is also resumed in its second one; small batches, so that a kill finds it running.
CHANGES = [
    "loggers=[]",
    *(f"stages.{stage}.batch_size=4" for stage in STAGES),
    *(f"stages.{stage}.save_every=3" for stage in STAGES),
    *("stages.sft.evaluate_every=6", "stages.sft.patience=1", "stages.dfpo.patience=0", "stages.dfpo.evaluate_every=0"),
    *("stages.mue.evaluate_every=3", "stages.mue.keep=best"),
    *(f"stages.{stage}.epochs=2" for stage in STAGES),
    *("corpus.texts=24", "corpus.selections=8", "corpus.dialogues=16", "corpus.preferences=16"),
    *("corpus.task_dialogues=24", "stages.cpt.copy_exercises=8", "corpus.held_out=4"),
]


def _start(work: Path, folder: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pediatricsgpt", "train", str(RECIPE), *CHANGES, "-o", folder]
    return subprocess.Popen(command, cwd=work, env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def _finish(process: subprocess.Popen[str]) -> str:
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    return errors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was left alone, and one killed once in every stage."""
    work = tmp_path_factory.mktemp("resume")
    _finish(_start(work, "alone"))
    said = ""
    for stage in STAGES:
        process = _start(work, "killed")
        deadline = time.monotonic() + 120
        checkpoints = work / "killed" / "checkpoints" / stage
        # Some steps after the first checkpoint, so that work is lost and must be done again.
        while not _rows_after_checkpoint(checkpoints, work / "killed" / "metrics.jsonl", stage):
            assert process.poll() is None, f"{stage} ended before it could be killed: {process.communicate()[1]}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        said += process.communicate()[1]
        if stage == "sft":
            damaged = max(checkpoints.glob("checkpoint-*"), key=step_of)
            weights = damaged / "model.safetensors"
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        assert not (work / "killed" / f"{STAGES.index(stage) + 1}-{stage}").exists()
    said += _finish(_start(work, "killed"))
    assert "mue: continuing from checkpoint-" in said
    assert "is damaged (model.safetensors is not as it was written)" in said
    return work / "alone", work / "killed"


def _rows_after_checkpoint(checkpoints: Path, metrics: Path, stage: str) -> bool:
    steps = [int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*")]
    rows = [row["step"] for row in read_metrics(metrics) if row["stage"] == stage]
    return bool(steps and rows) and rows[-1] > min(steps)


@pytest.mark.parametrize(
    "file", [f"{n}-{s}/model.safetensors" for n, s in enumerate(STAGES[:3], 1)] + ["4-mue/adapter_model.safetensors"]
)
def test_the_weights_are_the_same(runs: tuple[Path, Path], file: str) -> None:
    alone, killed = (load_file(run / file) for run in runs)
    assert alone.keys() == killed.keys()
    for name, tensor in alone.items():
        assert tensor.equal(killed[name]), name


def test_the_losses_are_the_same_and_no_step_comes_twice(runs: tuple[Path, Path]) -> None:
    alone, killed = (
        [(r["stage"], r["step"], r.get("loss")) for r in read_metrics(run / "metrics.jsonl")] for run in runs
    )
    assert alone == killed
    tokens = [{r["stage"]: r["tokens"] for r in read_metrics(run / "metrics.jsonl") if "tokens" in r} for run in runs]
    assert tokens[0] == tokens[1], "what was read before the kill counts once"


def test_nothing_half_written_is_left(runs: tuple[Path, Path]) -> None:
    record = json.loads((runs[1] / "run.json").read_text(encoding="utf-8"))
    assert list(record["stages"]) == STAGES
    assert not list(runs[1].rglob("*.part"))
    assert not list((runs[1] / "checkpoints").iterdir())
