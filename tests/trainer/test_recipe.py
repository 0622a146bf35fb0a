"""Recipes are strict, and every shipped one loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
    with pytest.raises(RecipeError, match="trainer/recipes"):
        load_recipe(tmp_path / "none.yaml")
