"""Several processes train what one trains: DDP and FSDP2 as `accelerate launch` starts them, with the shipped files.

Everything runs over gloo on processors. The batch of each process is a part of the single process' batch, so every
loss must be the same; only the stage MUE differs, because each process draws router noise of its own.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
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
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer

from trainer.corpus.build import build_corpus
from trainer.folder import FOLDERS
from trainer.recipe import PROJECT, STAGES, load_recipe
from trainer.stages.checkpoints import damaged_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the launcher needs POSIX signals")

HERE = Path(__file__).parent
RECIPE = PROJECT / "tests" / "recipes" / "tiny.yaml"
# An epoch of every stage is one batch. CPT is long enough to be stopped in its middle, and it keeps no checkpoint
# unless it is stopped.
SIZES = [
    *("corpus.texts=16", "corpus.selections=4", "corpus.dialogues=12", "corpus.preferences=8"),
    *("corpus.task_dialogues=16", "corpus.held_out=4", "device=cpu", "stages.cpt.copy_exercises=0"),
    *("stages.cpt.epochs=12", "stages.cpt.warmup_steps=2", "stages.cpt.save_every=100", "stages.sft.epochs=3"),
]
WHOLE = [f"stages.{stage}.batch_size={size}" for stage, size in zip(STAGES, (16, 16, 8, 16), strict=True)]
HALVES = [f"stages.{stage}.batch_size={size}" for stage, size in zip(STAGES, (8, 8, 4, 8), strict=True)]
TOLERANCE = 1e-4
PATIENCE = 300


@dataclass(frozen=True)
class Trained:
    """The folder of a finished run, and a copy of what it was when the run was stopped on the way."""

    folder: Path
    stopped: Path | None = None

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
    _finish([sys.executable, "-m", "pediatricsgpt", *_train(WHOLE, corpus, folder)], folder)
    return Trained(folder)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory, corpus) -> Trained:
    folder = tmp_path_factory.mktemp("ddp")
    _finish(_launch("ddp", ["-m", "pediatricsgpt", *_train(HALVES, corpus, folder)]), folder)
    return Trained(folder)


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory, corpus) -> Trained:
    """Stopped in CPT by a signal to the launcher, continued by the same command."""
    folder = tmp_path_factory.mktemp("fsdp2")
    stopped = folder.with_name("stopped")
    metrics = folder / "metrics.jsonl"
    command = _launch("fsdp2", [str(HERE / "fsdp_front_door.py"), *_train(HALVES, corpus, folder)])
    with _started(command, folder) as process:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
    shutil.copytree(folder, stopped)
    _finish(command, folder)
    return Trained(folder, stopped)


@pytest.fixture(params=["ddp", "fsdp2"])
def double(request) -> Trained:
    """A run on two processes."""
    return request.getfixturevalue(request.param)


def test_a_signal_to_the_launcher_leaves_one_whole_checkpoint(fsdp2):
    last = _rows(fsdp2.stopped)[-1]
    assert last["step"] < max(fsdp2.losses(last["stage"]))
    (checkpoint,) = (fsdp2.stopped / "checkpoints" / last["stage"]).iterdir()
    assert checkpoint.name == f"checkpoint-{last['step']}"
    assert damaged_file(checkpoint) is None
    assert f"continuing from {checkpoint.name}" in _log(fsdp2.folder)


def test_processes_draw_different_noise(fsdp2):
    (checkpoint,) = (fsdp2.stopped / "checkpoints").glob("*/*")
    states = [torch.load(checkpoint / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in range(2)]
    assert not torch.equal(*states)


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
    _finish(command, folder)
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


def test_the_private_methods_of_trl_and_transformers_that_we_extend():
    """A failure here means: read their change log, then mend trainer/stages/loop.py and dfpo.py."""
    references = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert list(inspect.signature(DPOTrainer._precompute_ref_logps).parameters) == [
        "self",
        "dataset",
        "name",
        "batch_size",
    ]
    assert "cache_file = dataset._get_cache_file_path(fingerprint)" in references  # why the dataset needs a folder
    assert list(inspect.signature(Trainer._save).parameters) == ["self", "output_dir", "state_dict"]
    assert '"FULL_STATE_DICT" in str(' in inspect.getsource(Trainer.save_model)  # else it saves nothing under FSDP


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


def _finish(command: list[str], folder: Path) -> None:
    with _started(command, folder) as process:
        assert process.wait(PATIENCE) == 0, _log(folder)


def _log(folder: Path) -> str:
    return Path(f"{folder}.log").read_text(encoding="utf-8", errors="replace")


def _rows(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl; a torn one is an error."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _files(folder: Path) -> set[str]:
    """All files of a run but TensorBoard's, whose names hold the time and the process."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] != "tensorboard"}


def _found(worker: Path) -> dict:
    return json.loads((worker / "found.json").read_text(encoding="utf-8"))
