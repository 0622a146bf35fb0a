"""What a killed process leaves behind: unfinished checkpoints, cut metrics, rows that will come again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.recipe import PROJECT, RecipeError, load_recipe
from trainer.report import plot_losses
from trainer.stages.checkpoints import forget_after, last_complete, read_metrics


def _checkpoint(folder: Path, step: int, state: str | None) -> None:
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    if state is not None:
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state, encoding="utf-8")


def test_the_newest_complete_checkpoint_counts_and_unfinished_ones_go(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 9, '{"global_step": 9}')
    _checkpoint(tmp_path, 10, '{"global_step": 10}')
    _checkpoint(tmp_path, 11, '{"global_st')
    _checkpoint(tmp_path, 12, None)
    last, removed = last_complete(tmp_path)
    assert last == tmp_path / "checkpoint-10"
    assert sorted(removed) == ["checkpoint-11", "checkpoint-12"]
    assert not (tmp_path / "checkpoint-12").exists()
    assert last_complete(tmp_path / "none") == (None, [])


def test_rows_that_will_be_made_again_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"stage": "cpt", "step": 30, "loss": 1.0},
        *({"stage": "sft", "step": s, "loss": 1.0} for s in (10, 20, 30)),
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "sft", "st', encoding="utf-8")
    forget_after(file, "sft", 20)
    assert [(row["stage"], row["step"]) for row in read_metrics(file)] == [("cpt", 30), ("sft", 10), ("sft", 20)]


def test_a_run_too_short_to_log_has_no_picture(tmp_path: Path) -> None:
    assert plot_losses(tmp_path) is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("key_value_heads: 1", "key_value_heads: 3", "multiple of key_value_heads"),
        ("head_dim: 32", "head_dim: 33", "even"),
        ("  context", "  induction_heads: true\n  head_dim: 64\n  context", "induction_heads need"),
        ("batch_size: 16,", "batch_size: 16, epochs: 2,", "epochs"),
    ],
)
def test_shapes_that_cannot_work_are_refused_before_anything_is_built(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = (PROJECT / "tests" / "recipes" / "tiny.yaml").read_text(encoding="utf-8")
    if "head_dim: 64" in new:
        text = text.replace("  head_dim: 32\n", "")
    file = tmp_path / "shape.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        load_recipe(file)
