"""What a stage's records become: tokens, losses to truncation, packs or padding, optimiser steps.

The same tokenizer, template, packing and order of rows as in training; tests/trainer/test_plan.py compares every
figure with the real trainers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl.data_utils import common_prefix_length, pack_dataset

from trainer.corpus.record import Message, Record
from trainer.planning.activations import Batch
from trainer.recipe import CptRecipe, DfpoRecipe, PackedStage, Recipe, RecipeError, StageRecipe
from trainer.stages.copying import IGNORED
from trainer.stages.cpt import cpt_rows
from trainer.stages.sampling import EpochSampler

_KEYS = {"cpt": "texts", "sft": "dialogues", "dfpo": "preferences", "mue": "task_dialogues"}
SAMPLE = 50_000  # records of a stage that are tokenized; of more, as many evenly spread ones
# The sequences of a training row before truncation, each as booleans [tokens]: does the loss count the token? A text
# or dialogue is one sequence, a pair two (chosen and rejected, both behind the prompt).
Row = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class StageTokens:
    """Figures of one stage for one epoch; `sampled` records were tokenized and the figures scaled to all of them."""

    records: int
    sampled: int
    rows: int  # texts (cut at max_length), copy exercises, dialogues or pairs that are trained on
    tokens: int  # after truncation; of pairs chosen and rejected, each with the prompt
    scored: int  # tokens the loss counts
    dropped_tokens: int  # lost to max_length
    dropped_rows: int  # of these nothing that the loss counts was left
    packs: int | None
    padding: float  # share of the positions in a batch that hold nothing
    empty: float  # share of the packs' room that stays free; a pack is as long as its content, so it costs nothing
    longest: int  # tokens of the longest sequence or pack
    mean: float  # tokens of a sequence (of a document in a pack)
    steps: int


def count_tokens(
    recipe: Recipe, name: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, processes: int = 1
) -> StageTokens:
    """Counts what the stage `name` trains on. Raises RecipeError when nothing is left of its records."""
    stage = recipe.stage(name)
    sample = records[:: max(1, math.ceil(len(records) / SAMPLE))]
    scale = len(records) / max(1, len(sample))
    rows, limit = _rows(recipe, name, sample, scale, tokenizer), stage.max_length
    packed = isinstance(stage, PackedStage) and stage.packing
    # What holds nothing to score is left out: packs as a whole, else each row (by TRL, or trainer/stages/loop.py).
    packs = [pack for pack in _packs(rows, limit) if any(map(np.any, pack))] if packed and rows else []
    kept = [(row,) for pack in packs for row in pack] if packed else [row for row in _cut(rows, limit) if _any(row)]
    if not kept:
        raise RecipeError(
            f"stages.{name}: none of {len(records)} records leaves anything to train on: cut at max_length ({limit} "
            f"tokens), no answer is left. Raise stages.{name}.max_length."
            if records
            else f"stages.{name}: the corpus has no records for it. Give corpus.{_KEYS[name]} a number above 0."
        )
    tokens = sum(len(scored) for row in kept for scored in row)
    units = round(len(packs if packed else kept) * scale)
    sizes = [sum(map(len, pack)) for pack in packs] if packed else [max(map(len, row)) for row in kept]
    return StageTokens(
        records=len(records),
        sampled=len(sample),
        rows=round(len(kept) * scale),
        tokens=round(tokens * scale),
        scored=round(sum(int(scored[1:].sum()) for row in kept for scored in row) * scale),
        dropped_tokens=round((sum(len(scored) for row in rows for scored in row) - tokens) * scale),
        dropped_rows=round((len(rows) - len(kept)) * scale),
        packs=units if packed else None,
        padding=0.0 if packed else _padding(recipe, stage, kept, [row for row in rows if _any(row, limit)], processes),
        empty=1 - tokens / (len(packs) * limit) if packed else 0.0,
        longest=max(sizes),
        mean=tokens / sum(map(len, kept)),
        steps=count_steps(stage, units, processes),
    )


def count_steps(stage: StageRecipe, units: int, processes: int) -> int:
    """Optimiser steps over rows or packs, as transformers counts them (`Trainer.set_initial_training_values`)."""
    if stage.max_steps:
        return stage.max_steps
    batches = math.ceil(math.ceil(units / stage.batch_size) / processes)
    return math.ceil(stage.epochs * max(1, math.ceil(batches / stage.gradient_accumulation)))


def largest_batch(stage: StageRecipe, tokens: StageTokens | None) -> Batch:
    """The micro-batch that asks for most memory; without a corpus one full of max_length."""
    longest, rows = stage.max_length, stage.batch_size
    if tokens:
        longest, rows = tokens.longest, min(rows, tokens.packs or tokens.rows)
    if isinstance(stage, PackedStage) and stage.packing:
        return Batch(1, rows * longest, masked=True)
    rows *= 2 if isinstance(stage, DfpoRecipe) else 1
    return Batch(rows, longest, masked=rows > 1)


def _rows(
    recipe: Recipe, name: str, records: Sequence[Record], scale: float, tokenizer: PreTrainedTokenizerFast
) -> list[Row]:
    """The rows of `records`, which are one in `scale` of all."""
    stage = recipe.stage(name)
    if not records:
        return []
    if isinstance(stage, DfpoRecipe):
        return [_pair(record, tokenizer) for record in records]
    if not isinstance(stage, CptRecipe):
        dialogues = [_plain(record.messages) for record in records]
        rendered: Any = tokenizer.apply_chat_template(dialogues, return_dict=True, return_assistant_tokens_mask=True)
        return [(np.array(marks, dtype=bool),) for marks in rendered["assistant_masks"]]
    count = round(stage.copy_exercises / scale)
    return [(np.array(row["labels"]) != IGNORED,) for row in cpt_rows(records, tokenizer, stage, count, recipe.seed)]


def _pair(record: Record, tokenizer: PreTrainedTokenizerFast) -> Row:
    """The answers begin where the prompt and the rendered whole part, as TRL cuts them."""
    prompt = _plain(record.prompt)
    opening = _ids(tokenizer, prompt, add_generation_prompt=True)
    both = [_ids(tokenizer, prompt + _plain(answer)) for answer in (record.chosen, record.rejected)]
    start = min(common_prefix_length(opening, ids) for ids in both)
    return tuple(np.arange(len(ids)) >= start for ids in both)


def _ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: Any) -> list[int]:
    rendered: Any = tokenizer.apply_chat_template(messages, return_dict=True, **options)
    return rendered["input_ids"]


def _plain(messages: Sequence[Message] | None) -> list[dict[str, str]]:
    return [message.model_dump() for message in messages or ()]


def _any(row: Row, limit: int | None = None) -> bool:
    """Whether the loss counts any token of the first `limit`."""
    return any(scored[:limit].any() for scored in row)


def _cut(rows: Sequence[Row], limit: int) -> list[Row]:
    return [tuple(scored[:limit] for scored in row) for row in rows]


def _packs(rows: Sequence[Row], limit: int) -> list[list[np.ndarray]]:
    """The packs of single sequences, cut at `limit`. TRL packs a thousand rows at a time, so their order counts."""
    offsets = pa.array(np.cumsum([0, *(len(scored) for (scored,) in rows)]))
    column = pa.LargeListArray.from_arrays(offsets, pa.array(np.concatenate([row[0] for row in rows]).astype(np.int8)))
    packed: Any = pack_dataset(Dataset(pa.table({"input_ids": column})), limit, "bfd")
    return [
        np.split(np.array(scored, dtype=bool), np.cumsum(lengths)[:-1])
        for scored, lengths in zip(packed["input_ids"], packed["seq_lengths"], strict=True)
    ]


def _padding(recipe: Recipe, stage: StageRecipe, rows: Sequence[Row], whole: Sequence[Row], processes: int) -> float:
    """Share of padding in the micro-batches of the first epoch, in the order the stage draws them.

    `whole` are the same rows before truncation.
    """
    together = stage.batch_size * stage.gradient_accumulation * processes
    if isinstance(stage, DfpoRecipe):  # grouped by the longer side before truncation
        sizes = [max(len(chosen), len(rejected)) for chosen, rejected in whole]
    else:
        sizes = [len(scored) for (scored,) in rows]
    order = list(EpochSampler(len(rows), together, recipe.seed, sizes))
    batches = [order[start : start + stage.batch_size] for start in range(0, len(order), stage.batch_size)]
    positions = sum(max(len(s) for row in batch for s in rows[row]) * len(batch) * len(rows[0]) for batch in batches)
    return 1 - sum(len(scored) for row in rows for scored in row) / positions
