"""Several processes train what one trains: DDP and FSDP2 as `accelerate launch` starts them, with the shipped files.

Everything runs over gloo on processors. The batch of each process is a part of the single process' batch, so every
loss must be the same; only the stage MUE differs, because each process draws router noise of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.utils import fsdp_utils
from peft import PeftModel
from safetensors.torch import load_file
from scale_out_worker import expert_model, losses_without_noise, rows

from trainer.corpus.build import build_corpus
from trainer.folder import FOLDERS
from trainer.recipe import PROJECT, STAGES, load_recipe
from trainer.stages.checkpoints import damaged_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the launcher needs POSIX signals")

HERE = Path(__file__).parent
RECIPE = PROJECT / "tests" / "recipes" / "tiny.yaml"
# Rows of every stage are a multiple of its batch. CPT is long enough to be stopped in its middle.
SIZES = [
    *("corpus.texts=32", "corpus.selections=8", "corpus.dialogues=24", "corpus.preferences=16"),
    *("corpus.task_dialogues=32", "corpus.held_out=4", "device=cpu"),
    *("stages.cpt.epochs=4", "stages.cpt.warmup_steps=2", "stages.sft.epochs=2"),
]
WHOLE = [f"stages.{stage}.batch_size={size}" for stage, size in zip(STAGES, (16, 16, 8, 16), strict=True)]
HALVES = [f"stages.{stage}.batch_size={size}" for stage, size in zip(STAGES, (8, 8, 4, 8), strict=True)]
TOLERANCE = 1e-4
PATIENCE = 300


@dataclass
class Trained:
    """A finished run and, if it was stopped on the way, what lay in its folder then."""

    folder: Path
    checkpoints: list[Path]
    damaged: list[str | None]
    rows_when_stopped: list[dict]

    def losses(self, stage: str) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in _rows(self.folder) if row["stage"] == stage and "loss" in row}

    def record(self) -> dict:
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(load_recipe(RECIPE, SIZES), folder)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory, corpus) -> Trained:
    folder = tmp_path_factory.mktemp("single")
    with _started([sys.executable, "-m", "pediatricsgpt", *_train(WHOLE, corpus, folder)], folder) as process:
        assert process.wait(PATIENCE) == 0, _log(folder)
    return Trained(folder, [], [], [])


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def double(request, tmp_path_factory, corpus) -> Trained:
    """Two processes, stopped in CPT by a signal to the launcher and continued by the same command."""
    folder = tmp_path_factory.mktemp(request.param)
    program = {"ddp": ["-m", "pediatricsgpt"], "fsdp2": [str(HERE / "fsdp_front_door.py")]}[request.param]
    command = _launch(request.param, [*program, *_train(HALVES, corpus, folder)])
    with _started(command, folder) as process:
        while not _rows(folder) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    checkpoints = sorted((folder / "checkpoints").glob("*/*"))
    trained = Trained(folder, checkpoints, [damaged_file(path) for path in checkpoints], _rows(folder))
    with _started(command, folder) as process:
        assert process.wait(PATIENCE) == 0, _log(folder)
    return trained


def test_a_signal_to_the_launcher_leaves_one_whole_checkpoint(double):
    assert len(double.checkpoints) == 1
    assert double.damaged == [None]
    last = double.rows_when_stopped[-1]
    assert double.checkpoints[0].name == f"checkpoint-{last['step']}"
    assert last["step"] < max(double.losses(last["stage"]))
    assert f"continuing from checkpoint-{last['step']}" in _log(double.folder)


@pytest.mark.parametrize("stage", ["cpt", "sft", "dfpo"])
def test_two_processes_have_the_losses_of_one(single, double, stage):
    expected = single.losses(stage)
    assert len(expected) > 1
    assert double.losses(stage) == pytest.approx(expected, abs=TOLERANCE)


def test_the_experts_start_from_the_same_loss(single, double):
    # Their B is zero in the first step, so the noise changes nothing yet.
    assert double.losses("mue")[1] == pytest.approx(single.losses("mue")[1], abs=TOLERANCE)
    assert double.losses("mue").keys() == single.losses("mue").keys()


def test_the_weights_handed_on_are_those_of_one_process(single, double):
    for stage in ("cpt", "sft", "dfpo"):
        file = Path(FOLDERS[stage]) / "model.safetensors"
        torch.testing.assert_close(load_file(double.folder / file), load_file(single.folder / file), atol=1e-5, rtol=0)
    adapters = [load_file(run.folder / FOLDERS["mue"] / "adapter_model.safetensors") for run in (double, single)]
    shapes = [{name: tensor.shape for name, tensor in adapter.items()} for adapter in adapters]
    assert shapes[0] == shapes[1]


def test_held_out_losses_are_measured_on_whole_models_and_all_records(single, double):
    # Under FSDP a process may hold empty weights until they are sharded; measured, they would show here.
    ours, expected = double.record()["held_out"], single.record()["held_out"]
    assert ours.keys() == {"start", *STAGES}
    for when in ("start", "cpt", "sft", "dfpo"):
        assert ours[when] == pytest.approx(expected[when], rel=1e-3, abs=1e-5)


def test_the_run_folder_is_written_once(single, double):
    training = [(row["stage"], row["step"]) for row in _rows(double.folder) if "loss" in row]
    assert training == [(row["stage"], row["step"]) for row in _rows(single.folder) if "loss" in row]
    assert _files(double.folder) == _files(single.folder)
    for stage, ours in double.record()["stages"].items():
        expected = single.record()["stages"][stage]
        assert (ours["steps"], ours["tokens"]) == (expected["steps"], expected["tokens"])
    assert double.record()["hardware"]["processes"] == 2


@pytest.fixture(scope="module")
def worker(tmp_path_factory, single, corpus) -> Path:
    folder = tmp_path_factory.mktemp("worker")
    paths = [str(path) for path in (folder, single.folder, RECIPE, corpus)]
    command = _launch("ddp", [str(HERE / "scale_out_worker.py"), *paths, *SIZES, *HALVES])
    with _started(command, folder) as process:
        assert process.wait(PATIENCE) == 0, _log(folder)
    return folder


def test_the_experts_have_the_losses_of_one_process_without_noise(single, worker, corpus, tmp_path):
    expected = losses_without_noise(single.folder, RECIPE, [*SIZES, *WHOLE], corpus, tmp_path)
    assert len(expected) > 1
    assert _found(worker)["losses"] == pytest.approx(expected, abs=TOLERANCE)


def test_fully_sharded_experts_have_the_gradients_of_the_whole_model(worker):
    # With noise: the reference draws both processes' noise from their seeds.
    assert _found(worker)["sharded"] < 1e-5
    assert _found(worker)["checkpointed, ours"] < 1e-5


def test_the_checkpointing_of_accelerate_would_repeat_layers_with_other_noise(worker):
    """Why Run refuses fsdp_activation_checkpointing; when this fails, it can be allowed."""
    assert "checkpoint_wrapper(layer, preserve_rng_state=False)" in Path(fsdp_utils.__file__).read_text(
        encoding="utf-8"
    )
    assert _found(worker)["checkpointed, accelerate's"] > 0.01


def test_an_adapter_gathered_from_shards_loads_in_one_process(worker):
    logits = torch.load(worker / "logits.pt")
    base = expert_model().unload()
    model = PeftModel.from_pretrained(base, worker / "adapter").eval()
    with torch.no_grad():
        loaded = model(rows()[0]).logits
    torch.testing.assert_close(loaded, logits["sharded"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loaded, logits["whole"], atol=1e-5, rtol=0)
    before = expert_model().eval()
    with torch.no_grad():
        assert (before(rows()[0]).logits - loaded).abs().max() > 0.01  # the step that was taken is in the file


def _train(batches: list[str], corpus: Path, folder: Path) -> list[str]:
    return ["train", str(RECIPE), *SIZES, *batches, "--corpus", str(corpus), "-o", str(folder)]


def _launch(configuration: str, program: list[str]) -> list[str]:
    file = PROJECT / "trainer" / "recipes" / "accelerate" / f"{configuration}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0", *program]


@contextmanager
def _started(command: list[str], folder: Path) -> Iterator[subprocess.Popen]:
    """A process that writes its messages beside `folder` and does not outlive the test."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    with Path(f"{folder}.log").open("a") as log:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _log(folder: Path) -> str:
    return Path(f"{folder}.log").read_text(encoding="utf-8", errors="replace")


def _rows(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl; a torn one is an error, except while it is being written."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _files(folder: Path) -> set[str]:
    """All files of a run but TensorBoard's, whose names hold the time and the process."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != "tensorboard"}


def _found(worker: Path) -> dict:
    return json.loads((worker / "found.json").read_text(encoding="utf-8"))
