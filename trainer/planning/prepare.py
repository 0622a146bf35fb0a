"""What `plan` and `preview` need first: the corpus, its tokenizer, libraries that keep quiet."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from trainer.corpus.build import build_corpus, check_records, is_current
from trainer.origin import make_tokenizer
from trainer.recipe import Recipe
from trainer.stages.build import tokenizer_texts


def prepare_corpus(recipe: Recipe, folder: Path) -> bool:
    """Checks a finished corpus, or builds one from the cards if it is not there; returns whether it was built.

    Raises CorpusError.
    """
    if recipe.corpus.records:
        check_records(folder)
        return False
    if is_current(folder, recipe):
        return False
    build_corpus(recipe, folder)
    return True


def load_tokenizer(recipe: Recipe, corpus: Path) -> PreTrainedTokenizerFast:
    """The tokenizer a run with this recipe and corpus would have. Raises RecipeError, CorpusError."""
    return make_tokenizer(recipe, tokenizer_texts(corpus))


def quieten_libraries() -> None:
    """Warnings and progress bars of libraries that are no one's concern before a run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
