"""What `plan` and `preview` need first: the corpus, its tokenizer, libraries that keep quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from transformers import PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from trainer.corpus.build import MANIFEST, build_corpus, check_records, is_current
from trainer.origin import make_tokenizer
from trainer.recipe import Recipe
from trainer.stages.build import tokenizer_texts


@contextmanager
def prepared_corpus(recipe: Recipe, folder: Path) -> Iterator[Path]:
    """A finished corpus is checked, one that is not there is built from the cards.

    What stands in `folder` for another recipe, other cards or another seed is left alone: runs may go on with it.
    Then the corpus is built in a temporary folder. Raises CorpusError.
    """
    if recipe.corpus.records:
        check_records(folder)
    elif not (folder / MANIFEST).exists():
        build_corpus(recipe, folder)
    elif not is_current(folder, recipe):
        with TemporaryDirectory() as temporary:
            build_corpus(recipe, Path(temporary) / folder.name)
            yield Path(temporary) / folder.name
        return
    yield folder


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
