"""What a stage's trainer is fed: batches of the real trainer over a few records, taken apart again.

The trainer is built as `train` builds it (trainer/stages/build.py), around a random model of the same kind and
vocabulary that is too small to matter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from trainer.corpus.build import STAGE_FILES
from trainer.corpus.record import Record, write_records
from trainer.origin import model_config
from trainer.planning.prepare import load_tokenizer
from trainer.recipe import STAGES, CptRecipe, DfpoRecipe, PackedStage, Recipe, RecipeError
from trainer.stages.build import stage_records, stage_trainer
from trainer.stages.copying import IGNORED
from trainer.stages.loop import StageError
from trainer.stages.template import check_template

_SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "layer_types": None,
}
_UNLIMITED = 10**9


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind."""

    text: str
    tokens: int
    scored: bool  # the loss counts them
    special: bool


@dataclass(frozen=True)
class Document:
    """A text, a copy exercise, a dialogue, or one side of a pair; in a pack it has positions of its own."""

    role: str  # text, exercise, dialogue, chosen or rejected
    spans: list[Span]
    dropped: int  # tokens cut off by max_length
    continues: bool  # a text that goes on in another row

    @property
    def tokens(self) -> int:
        return sum(span.tokens for span in self.spans)

    @property
    def scored(self) -> int:
        return sum(span.tokens for span in self.spans if span.scored)


@dataclass(frozen=True)
class Row:
    """One row of a batch, or the two rows of a pair."""

    batch: int
    documents: list[Document]
    padding: int


@dataclass(frozen=True)
class Preview:
    """Rows in the order of the first epoch; `left_out` records have nothing to score within max_length."""

    stage: str
    max_length: int
    packed: bool
    records: int
    left_out: int
    rows: list[Row]


def preview(recipe: Recipe, corpus: Path, name: str, count: int = 3, seed: int | None = None) -> Preview:
    """Rows of the stage `name` from the first `count` records of the corpus, or with a `seed` from random ones.

    Raises RecipeError, also when none of them has anything to score within max_length, and CorpusError.
    """
    tokenizer = load_tokenizer(recipe, corpus)
    check_template(tokenizer)
    records = stage_records(name, corpus)
    chosen = records[:count] if seed is None else random.Random(seed).sample(records, min(count, len(records)))
    config = small_config(model_config(recipe, len(tokenizer)))
    recipe = _bare(recipe, name, count)
    stage = recipe.stage(name)
    packed = isinstance(stage, PackedStage) and stage.packing
    try:
        trainer = _trainer(recipe, name, chosen, tokenizer, config)
    except StageError:
        raise RecipeError(
            f"stages.{name}: none of these {len(chosen)} records leaves anything to score within max_length "
            f"({stage.max_length}). Raise stages.{name}.max_length, or look at other records with --seed."
        ) from None
    free = {"max_length": _UNLIMITED} | ({"packing": False} if packed else {})
    whole = _sequences(_trainer(_with(recipe, name, free), name, chosen, tokenizer, config).train_dataset)
    reader = _Reader(tokenizer, whole, isinstance(stage, CptRecipe))
    rows = []
    for number, batch in enumerate(trainer.get_train_dataloader(), 1):
        rows += reader.pairs(number, batch) if isinstance(stage, DfpoRecipe) else reader.rows(number, batch)
    shown = len(rows) if isinstance(stage, DfpoRecipe) else sum(len(row.documents) for row in rows)
    left_out = 0 if isinstance(stage, CptRecipe) else len(chosen) - shown
    return Preview(name, stage.max_length, packed, len(chosen), left_out, rows)


def small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture and vocabulary with one layer of eight numbers."""
    return type(config).from_dict({**config.to_dict(), **_SMALL})


def _bare(recipe: Recipe, name: str, count: int) -> Recipe:
    """The recipe without what only a run needs: its device, loggers, evaluations and reference log-probabilities."""
    changes: dict[str, Any] = {"evaluate_every": 0, "patience": 0, "keep": "last", "max_steps": 0}
    stage = recipe.stage(name)
    if isinstance(stage, DfpoRecipe):
        changes["precompute_reference"] = False
    if isinstance(stage, CptRecipe):
        changes["copy_exercises"] = min(count, stage.copy_exercises)
    return _with(recipe, name, changes).model_copy(update={"device": "cpu", "loggers": ()})


def _with(recipe: Recipe, name: str, changes: dict[str, Any]) -> Recipe:
    stage = recipe.stage(name).model_copy(update=changes)
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={name: stage})})


def _trainer(
    recipe: Recipe,
    name: str,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    config: PreTrainedConfig,
) -> Any:
    with TemporaryDirectory() as folder:
        write_records(Path(folder) / STAGE_FILES[STAGES.index(name)], records)
        model = AutoModelForCausalLM.from_config(config)
        return stage_trainer(name, model, tokenizer, recipe, Path(folder), Path(folder) / name)


def _sequences(rows: Any) -> list[list[int]]:
    """Token ids of all sequences of a training set."""
    if "prompt_ids" in rows.column_names:
        return [row["prompt_ids"] + row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]
    return [row["input_ids"] for row in rows]


class _Reader:
    """Turns the tensors of a collated batch back into text. `whole` are all sequences before truncation."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, whole: list[list[int]], cut: bool) -> None:
        self.tokenizer = tokenizer
        self.whole = whole
        self.cut = cut
        # `all_special_ids` names only those with a role (pad, eos), not <|im_start|>.
        self.special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def rows(self, number: int, batch: dict[str, torch.Tensor]) -> Iterator[Row]:
        """Rows of a CPT, SFT or PSFT batch; in a packed one a document begins where positions start again."""
        for index, ids in enumerate(batch["input_ids"].tolist()):
            length = int(batch["attention_mask"][index].sum()) if "attention_mask" in batch else len(ids)
            scored = (batch["labels"][index] != IGNORED).tolist()
            starts = [0]
            if "position_ids" in batch:
                starts = [place for place, position in enumerate(batch["position_ids"][index].tolist()) if not position]
            documents = [
                self._document(ids[start:end], [False, *scored[start + 1 : end]])
                for start, end in zip(starts, [*starts[1:], length], strict=True)
            ]
            yield Row(number, documents, len(ids) - length)

    def pairs(self, number: int, batch: dict[str, torch.Tensor]) -> Iterator[Row]:
        """Rows of a DFPO batch, whose first half is chosen and whose second half is rejected."""
        half = len(batch["input_ids"]) // 2
        for index in range(half):
            documents, padding = [], 0
            for role, place in (("chosen", index), ("rejected", index + half)):
                length = int(batch["attention_mask"][place].sum())
                ids = batch["input_ids"][place].tolist()
                scored = batch["completion_mask"][place].bool().tolist()
                documents.append(self._document(ids[:length], scored[:length], role))
                padding += len(ids) - length
            yield Row(number, documents, padding)

    def _document(self, ids: list[int], scored: list[bool], role: str = "dialogue") -> Document:
        if self.cut:
            role = "text" if all(scored[1:]) else "exercise"
        ends = any(sequence[-len(ids) :] == ids for sequence in self.whole)
        longer = next((len(sequence) for sequence in self.whole if sequence[: len(ids)] == ids), len(ids))
        dropped = 0 if ends or role == "text" else longer - len(ids)
        return Document(role, list(self._spans(ids, scored)), dropped, role == "text" and not ends)

    def _spans(self, ids: list[int], scored: list[bool]) -> Iterator[Span]:
        """Runs of tokens that are alike. A run's text is what it adds to the text before it, spaces included."""
        kinds = [(mark, token in self.special) for token, mark in zip(ids, scored, strict=True)]
        end, before = 0, ""
        for (mark, special), run in groupby(kinds):
            count = len(list(run))
            end += count
            text = str(self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
            yield Span(text[len(before) :], count, mark, special)
            before = text
