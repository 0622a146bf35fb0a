"""Stage 1, CPT: hybrid-instruction continuous pre-training (here from scratch), plain next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trainer.corpus.record import Record
from trainer.recipe import Recipe
from trainer.stages.common import training_arguments
from trainer.stages.copying import copy_exercises


def cpt_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, records: Sequence[Record], checkpoints: Path
) -> SFTTrainer:
    """Copy exercises first, then the corpus' texts mixed with more of them."""
    stage = recipe.stages.cpt
    start, eos = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    vocabulary = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    exercises = copy_exercises(
        stage.copy_exercises, vocabulary, recipe.seed, start=start, end=tokenizer.pad_token_id, eos=eos
    )
    texts = tokenizer([f"{record.text}<|im_end|>" for record in records])["input_ids"]
    rows = exercises + [{"input_ids": ids, "labels": list(ids)} for ids in texts]
    arguments = training_arguments(recipe, stage, checkpoints)
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
