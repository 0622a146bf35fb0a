"""What a run says when the machine fails it: memory, disk, packages; what it makes up for after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from trainer.folder import RunError
from trainer.recipe import PROJECT, RecipeError, load_recipe
from trainer.run import Run
from trainer.stages.loop import StageLoop

TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"
SMALL = [
    "loggers=[]",
    *("corpus.texts=8", "corpus.selections=4", "corpus.dialogues=8", "corpus.preferences=4"),
    *("corpus.task_dialogues=8", "corpus.held_out=4", "stages.cpt.copy_exercises=0"),
]


def _run(folder: Path, *changes: str) -> Run:
    recipe = load_recipe(TINY, [*SMALL, *changes])
    return Run(recipe, folder / "run", folder / "corpus", Console(quiet=True))


@pytest.mark.parametrize(
    ("error", "changes", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            [],
            r"activation_checkpointing=true(.|\n)*stages.cpt.batch_size=8 stages.cpt.gradient_accumulation=2",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            ["stages.cpt.batch_size=1", "stages.cpt.activation_checkpointing=true"],
            r"stages.cpt.method=lora",
        ),
        (OSError(28, "No space left on device"), [], "disk .* is full. Make room; the same command continues"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos: No space left"), [], "is full"),
    ],
    ids=["gpu memory", "memory", "disk", "disk, as torch says it"],
)
def test_a_machine_that_gives_up_is_answered_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, changes: list[str], says: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(StageLoop, "training_step", fail)
    with pytest.raises(RunError, match=says):
        _run(tmp_path, *changes).execute()


def test_an_error_of_our_own_stays_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shape '[2, 3]' is invalid")

    monkeypatch.setattr(StageLoop, "training_step", fail)
    with pytest.raises(RuntimeError, match="shape"):
        _run(tmp_path).execute()


def test_a_package_that_only_this_recipe_needs_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"uses wandb.*pediatricsgpt\[loggers\]"):
        _run(tmp_path, "loggers=[wandb]")


def test_figures_missing_after_a_kill_between_stages_are_made_up_for(tmp_path: Path) -> None:
    _run(tmp_path).execute()
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    measured = record["held_out"].pop("sft")
    file.write_text(json.dumps(record), encoding="utf-8")
    weights = (tmp_path / "run" / "4-mue" / "adapter_model.safetensors").stat().st_mtime_ns
    _run(tmp_path).execute()
    assert json.loads(file.read_text(encoding="utf-8"))["held_out"]["sft"] == pytest.approx(measured, rel=1e-6)
    assert (tmp_path / "run" / "4-mue" / "adapter_model.safetensors").stat().st_mtime_ns == weights
