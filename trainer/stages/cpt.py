"""Stage 1, CPT: hybrid-instruction continuous pre-training (here from scratch), plain next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trainer.corpus.record import Record
from trainer.recipe import Recipe
from trainer.stages.common import training_arguments
from trainer.stages.copying import copy_exercises
from trainer.tokenizer import token_id


def cpt_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    records: Sequence[Record],
    checkpoints: Path,
) -> SFTTrainer:
    """The corpus' texts mixed with copy exercises (batches are drawn by length)."""
    stage = recipe.stages.cpt
    texts: list[list[int]] = tokenizer([f"{record.text}<|im_end|>" for record in records])["input_ids"]  # type: ignore[assignment]
    special = set(tokenizer.all_special_ids)
    exercises = copy_exercises(
        stage.copy_exercises,
        [token for ids in texts for token in ids if token not in special],
        [token for token in range(len(tokenizer)) if token not in special],
        recipe.seed,
        start=token_id(tokenizer, "<|im_start|>"),
        end=token_id(tokenizer, "<|endoftext|>"),
        eos=token_id(tokenizer, "<|im_end|>"),
    )
    rows = exercises + [{"input_ids": ids, "labels": list(ids)} for ids in texts]
    arguments = training_arguments(recipe, stage, checkpoints)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
