"""One way to build any stage's trainer: `train` runs it, `preview` looks at its batches, tests hold it to numbers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainer.corpus.record import CorpusError, Record, read_records
from trainer.recipe import Recipe
from trainer.stages.cpt import cpt_trainer
from trainer.stages.dfpo import dfpo_trainer
from trainer.stages.psft import psft_trainer
from trainer.stages.sft import sft_trainer

_MAKERS: dict[str, Callable[..., Any]] = {
    "cpt": cpt_trainer,
    "sft": sft_trainer,
    "dfpo": dfpo_trainer,
    "mue": psft_trainer,
}
# Corpus files of each stage: what it trains on, what it is evaluated on while it trains.
_FILES = {
    "cpt": ("cpt", "held_out_texts"),
    "sft": ("sft", "held_out_questions"),
    "dfpo": ("preferences", "held_out_preferences"),
    "mue": ("mue", "held_out_questions"),
}


def stage_records(name: str, corpus: Path, limit: int | None = None) -> list[Record]:
    """What a stage trains on (the first `limit`). Raises CorpusError, also when there is nothing."""
    file = corpus / f"{_FILES[name][0]}.jsonl"
    records = list(islice(read_records(file), limit))
    if not records:
        raise CorpusError(f"{file} has no records, so {name} has nothing to learn from. Give the corpus some.")
    return records


def evaluation_file(name: str, corpus: Path) -> Path:
    """What a stage is evaluated on while it trains."""
    return corpus / f"{_FILES[name][1]}.jsonl"


def tokenizer_texts(corpus: Path) -> list[str]:
    """What a new tokenizer is trained on: the texts and dialogues of the first two stages."""
    texts = [record.text or "" for record in stage_records("cpt", corpus)]
    return texts + [message.content for record in stage_records("sft", corpus) for message in record.messages or ()]


def stage_trainer(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    corpus: Path,
    checkpoints: Path,
    limit: int | None = None,
) -> Any:
    """TRL's trainer of the stage `name`, on the corpus' records (the first `limit`)."""
    records = stage_records(name, corpus, limit)
    held_out: list[Record] = []
    if recipe.stage(name).evaluate_every:
        held_out = list(read_records(evaluation_file(name, corpus)))
    return _MAKERS[name](model, tokenizer, recipe, records, held_out, checkpoints)
