"""Recipes are strict, and every shipped one loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer.commands.recipes import main as recipes
from trainer.recipe import PROJECT, RecipeError, load_recipe

SHIPPED = sorted((PROJECT / "trainer" / "recipes").glob("*.yaml"))
TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"


@pytest.mark.parametrize("path", [*SHIPPED, TINY], ids=lambda path: path.stem)
def test_shipped_recipes_load_and_are_named_after_their_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("where", "key", "value", "says"),
    [
        ((), "modell", {}, "did you mean 'model'"),
        (("stages", "sft"), "learning_rat", 1, "did you mean 'learning_rate'"),
        (("stages", "sft"), "batch_size", 0, "stages.sft.batch_size"),
        (("model",), "xyzzy", 1, "valid keys: hidden_size"),
        ((), "name", "Not A Name", "name"),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_one(tmp_path: Path, where, key, value, says) -> None:
    data = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    place = data
    for part in where:
        place = place[part]
    place[key] = value
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        load_recipe(file)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- just\n- a list", b""])
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(file)


def test_a_missing_recipe_says_where_the_shipped_ones_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Shipped: .*demo"):
        load_recipe(tmp_path / "none.yaml")


def test_a_stage_inherits_what_it_does_not_say_over_a_stage_that_cannot_have_it() -> None:
    recipe = load_recipe(TINY, ["stages.cpt.packing=true", "stages.cpt.max_length=300", "stages.sft.max_length=200"])
    assert recipe.stages.sft.packing
    assert recipe.stages.mue.packing, "DFPO has no packing, and hands it on all the same"
    assert (recipe.stages.dfpo.max_length, recipe.stages.mue.max_length) == (200, 200)
    inherited, overridden = recipe.inheritance("sft")
    assert inherited["packing"] is True
    assert overridden["max_length"] == (300, 200)
    assert recipe.inheritance("cpt") == ({}, {})
    assert "copy_exercises" not in recipe.inheritance("sft")[0], "what only one stage has is not inherited"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.sft.max_lenght=3", "did you mean 'max_length'"),
        ("stages.cpt.load_in_4bit=true", "set method to lora"),
        ("stages.cpt.lora_targets=[q_proj, lm_head]", "may not name lm_head"),
        ("stages.mue.patience=2", "set evaluate_every"),
        ("base=models/x", "leave out model and tokenizer"),
        ("corpus.records=x", "either `cards`"),
        ("name.first=x", "name is a value"),
        ("seed", "write KEY=VALUE"),
        ("seed=[", "not YAML"),
        ("loggers=[tensorbord]", "tensorboard"),
    ],
)
def test_overrides_are_as_strict_as_the_file(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(TINY, [override])


def test_numbers_without_a_point_are_numbers() -> None:
    assert load_recipe(TINY, ["stages.sft.learning_rate=1e-5"]).stages.sft.learning_rate == 1e-5


def test_a_shipped_recipe_is_found_by_its_name_and_copied_under_a_new_one(tmp_path: Path, capsys) -> None:
    assert load_recipe(Path("qwen3-4b")).stages.sft.method == "lora"
    copy = tmp_path / "My Clinic.yaml"
    assert recipes(["copy", "qwen3-4b", str(copy)]) == 0
    assert load_recipe(copy).name == "my-clinic"
    assert load_recipe(copy).stages == load_recipe(Path("qwen3-4b")).stages
    assert recipes(["copy", "qwen3-4b", str(copy)]) == 2
    assert "is there already" in capsys.readouterr().err
