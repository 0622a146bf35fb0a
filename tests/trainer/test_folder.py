"""A run folder holds its run to one recipe and one corpus; what is still to come may change when it is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from trainer.corpus.build import build_corpus
from trainer.folder import RunError, RunFolder, digests
from trainer.recipe import PROJECT, load_recipe
from trainer.stages.checkpoints import read_metrics

TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"
QUIET = Console(quiet=True)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run whose first two stages are done."""
    recipe = load_recipe(TINY)
    build_corpus(recipe, tmp_path / "corpus")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.create(recipe, tmp_path / "corpus", 1)
    folder.record["stages"] = {"cpt": {}, "sft": {}}
    folder.write()
    return folder


def test_quantize_gets_dialogues_to_merge_on_and_others_to_measure_on(folder: RunFolder) -> None:
    kept = {}
    for name in ("calibration.jsonl", "held_out.jsonl"):
        rows = [json.loads(line) for line in (folder.path / name).read_text(encoding="utf-8").splitlines()]
        assert {row["task"] for row in rows} <= {"knowledge", "diagnosis", "treatment"}
        kept[name] = {json.dumps(row["messages"], ensure_ascii=False) for row in rows}
    assert all(kept.values())
    assert not kept["calibration.jsonl"] & kept["held_out.jsonl"]


def test_the_same_recipe_goes_on(folder: RunFolder) -> None:
    again = RunFolder(folder.path)
    assert again.read()
    again.check_recipe(load_recipe(TINY), False, QUIET)


@pytest.mark.parametrize(
    ("change", "may"),
    [
        ("stages.dfpo.learning_rate=1e-7", True),
        ("stages.mue.batch_size=2", True),
        ("loggers=[]", True),
        ("stages.sft.learning_rate=1e-7", False),
        ("seed=5", False),
        ("model.layers=4", False),
        ("corpus.texts=5", False),
    ],
)
def test_only_what_is_still_to_come_may_change(folder: RunFolder, change: str, may: bool) -> None:
    # A change of SFT is inherited by the stages after it, but SFT is done.
    recipe = load_recipe(TINY, [change])
    with pytest.raises(RunError, match=change.split("=")[0]) as refused:
        folder.check_recipe(recipe, False, QUIET)
    assert ("--accept-changes" in str(refused.value)) is may
    if not may:
        with pytest.raises(RunError, match="another recipe"):
            folder.check_recipe(recipe, True, QUIET)
        return
    folder.check_recipe(recipe, True, QUIET)
    record = json.loads((folder.path / "run.json").read_text(encoding="utf-8"))
    assert change.split("=")[0] in record["changes"][0]
    RunFolder(folder.path).read()
    folder.check_recipe(recipe, False, QUIET)


@pytest.mark.parametrize(
    ("change", "keeps"), [("learning_rate=1e-7", True), ("method=lora", False), ("batch_size=2", False)]
)
def test_checkpoints_that_do_not_fit_the_new_settings_go(folder: RunFolder, change: str, keeps: bool) -> None:
    """Their optimiser would have other parameters, or the rows would not be the same ones in the same place."""
    (folder.checkpoints("dfpo") / "checkpoint-2").mkdir(parents=True)
    rows = [{"stage": "sft", "step": 9, "loss": 1.0}, {"stage": "dfpo", "step": 2, "loss": 1.0}]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder.check_recipe(load_recipe(TINY, [f"stages.dfpo.{change}"]), True, QUIET)
    assert folder.checkpoints("dfpo").exists() is keeps
    assert [row["stage"] for row in read_metrics(folder.metrics)] == ["sft", "dfpo"][: 2 if keeps else 1]


def test_a_damaged_stage_is_not_built_upon(folder: RunFolder) -> None:
    folder.stage("sft").mkdir()
    weights = folder.stage("sft") / "model.safetensors"
    weights.write_bytes(b"weights")
    folder.record["stages"]["sft"]["files"] = digests(folder.stage("sft"))
    folder.check_stage("sft")
    weights.write_bytes(b"weighty")
    with pytest.raises(RunError, match=r"model\.safetensors is not as its stage left it"):
        folder.check_stage("sft")
    weights.unlink()
    with pytest.raises(RunError, match="is not as its stage left it"):
        folder.check_stage("sft")


def test_two_trains_cannot_share_a_folder(folder: RunFolder) -> None:
    with folder.lock(True), pytest.raises(RunError, match="Another"), RunFolder(folder.path).lock(True):
        pass
    with folder.lock(True):
        pass


def test_other_records_are_another_run(folder: RunFolder, tmp_path: Path) -> None:
    build_corpus(load_recipe(TINY, ["seed=9"]), tmp_path / "other")
    folder.check_corpus(tmp_path / "corpus")
    with pytest.raises(RunError, match="another corpus"):
        folder.check_corpus(tmp_path / "other")


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}', ""])
def test_a_record_that_cannot_be_used_is_said(folder: RunFolder, content: str) -> None:
    (folder.path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"run\.json cannot be used"):
        RunFolder(folder.path).read()
