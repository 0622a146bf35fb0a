"""Stage 1, CPT: hybrid-instruction continuous pre-training, plain next-token loss over all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trainer.corpus.record import Record
from trainer.recipe import CptRecipe, Recipe
from trainer.stages.adapters import lora_config
from trainer.stages.arguments import training_arguments
from trainer.stages.copying import copy_exercises
from trainer.stages.loop import StageLoop
from trainer.tokenizer import token_id


class TextTrainer(StageLoop, SFTTrainer):
    """TRL's SFTTrainer with our loop: stages CPT, SFT and PSFT."""


def text_rows(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids of texts, each ended by eos; longer ones go on in the next row, so that no token is lost."""
    texts: Any = tokenizer([f"{record.text}{tokenizer.eos_token}" for record in records])["input_ids"]
    pieces = [ids[start : start + max_length] for ids in texts for start in range(0, len(ids), max_length)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in pieces]


def cpt_rows(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerFast, stage: CptRecipe, exercises: int, seed: int
) -> list[dict[str, list[int]]]:
    """The texts, for a new model behind `exercises` copy exercises over their tokens."""
    rows = text_rows(records, tokenizer, stage.max_length)
    if not exercises:
        return rows
    control = set(tokenizer.added_tokens_decoder)
    drawn = copy_exercises(
        exercises,
        [token for row in rows for token in row["input_ids"] if token not in control],
        [token for token in range(len(tokenizer)) if token not in control],
        seed,
        start=token_id(tokenizer, "<|im_start|>"),
        end=token_id(tokenizer, "<|endoftext|>"),
        eos=token_id(tokenizer, "<|im_end|>"),
    )
    return drawn + rows


def cpt_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    records: Sequence[Record],
    held_out: Sequence[Record],
    checkpoints: Path,
) -> TextTrainer:
    """Next-token loss on all tokens."""
    stage = recipe.stages.cpt
    rows = cpt_rows(records, tokenizer, stage, stage.copy_exercises, recipe.seed)
    trainer = TextTrainer(
        model=model,
        args=SFTConfig(**training_arguments(recipe, stage, checkpoints)),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(text_rows(held_out, tokenizer, stage.max_length)) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora_config(stage),  # type: ignore[arg-type]
    )
    trainer.configure(stage, len(rows), len(held_out), cut=False)
    return trainer
