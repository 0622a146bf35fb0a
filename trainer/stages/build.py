"""One way to build any stage's trainer: `train` runs it, `preview` looks at its batches, tests hold it to numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainer.corpus.record import Record, read_records
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


def stage_records(name: str, corpus: Path) -> list[Record]:
    """What a stage trains on. Raises CorpusError."""
    return list(read_records(corpus / f"{_FILES[name][0]}.jsonl"))


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
    records = stage_records(name, corpus)[:limit]
    evaluated = corpus / f"{_FILES[name][1]}.jsonl"
    held_out: list[Record] = []
    if recipe.stage(name).evaluate_every and evaluated.exists():
        held_out = list(read_records(evaluated))
    return _MAKERS[name](model, tokenizer, recipe, records, held_out, checkpoints)
