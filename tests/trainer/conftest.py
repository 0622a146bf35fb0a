"""The suite's small corpus and its tokenizer; a test module that needs others defines its own of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from trainer.corpus.build import build_corpus
from trainer.planning.prepare import load_tokenizer, quieten_libraries
from trainer.recipe import PROJECT, load_recipe

TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quieten_libraries()
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    build_corpus(load_recipe(TINY), folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(load_recipe(TINY), corpus)
