"""What a killed process or a failing disk leaves behind: damaged checkpoints, cut metrics, rows that come again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.recipe import PROJECT, RecipeError, load_recipe
from trainer.stages.checkpoints import damaged_file, forget_after, forget_old, last_sound, read_metrics, seal

STATE = '{"global_step": 9, "stateful_callbacks": {}}'


def _checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(STATE, encoding="utf-8")
    (checkpoint / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (checkpoint / "global_step" / "shard.pt").write_bytes(b"x" * 100)
    seal(checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda c: (c / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes()[:-1]),
            "model.safetensors",
        ),
        (lambda c: (c / "global_step" / "shard.pt").unlink(), "global_step/shard.pt"),
        (lambda c: (c / "seal.json").write_text("{"), "seal.json"),
        (lambda c: (c / "seal.json").unlink(), "seal.json"),
    ],
    ids=["cut", "file gone", "seal cut", "no seal"],
)
def test_any_damage_falls_back_to_the_checkpoint_before(tmp_path: Path, damage, named: str) -> None:
    _checkpoint(tmp_path, 4)
    newest = _checkpoint(tmp_path, 10)
    damage(newest)
    last, warnings = last_sound(tmp_path)
    assert last == tmp_path / "checkpoint-4"
    assert named in warnings[0]
    assert (tmp_path / "damaged-checkpoint-10").exists(), "set aside, not deleted"
    assert last_sound(tmp_path) == (last, []), "said once"


def test_one_flipped_bit_is_seen(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, 2)
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[1234] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    assert damaged_file(checkpoint) == "model.safetensors"


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert last_sound(tmp_path / "none") == (None, [])


def test_the_best_checkpoint_outlives_the_newest_two(tmp_path: Path) -> None:
    for step in (2, 4, 10, 100):
        _checkpoint(tmp_path, step)
    forget_old(tmp_path, best=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-10", "checkpoint-100"}


def test_rows_that_will_be_made_again_are_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"stage": "cpt", "step": 30, "loss": 1.0},
        *({"stage": "sft", "step": s, "loss": 1.0} for s in (10, 20, 30)),
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "sft", "st', encoding="utf-8")
    forget_after(file, "sft", 20)
    assert [(row["stage"], row["step"]) for row in read_metrics(file)] == [("cpt", 30), ("sft", 10), ("sft", 20)]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("key_value_heads: 1", "key_value_heads: 3", "multiple of key_value_heads"),
        ("head_dim: 32", "head_dim: 33", "even"),
        ("  context", "  induction_heads: true\n  head_dim: 64\n  context", "induction_heads need"),
        ("batch_size: 16,", "batch_size: 16, epochs: 0,", "epochs"),
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
