"""Stage 2, SFT on dialogues: only the assistant's tokens are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig

from trainer.corpus.record import Record
from trainer.recipe import PackedStage, Recipe
from trainer.stages.adapters import lora_config
from trainer.stages.arguments import training_arguments
from trainer.stages.cpt import TextTrainer


def dialogue_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    stage: PackedStage,
    records: Sequence[Record],
    held_out: Sequence[Record],
    checkpoints: Path,
    peft_config: PeftConfig | None,
) -> TextTrainer:
    """Our template marks the assistant's tokens with `{% generation %}`, which TRL turns into the loss mask."""
    trainer = TextTrainer(
        model=model,
        args=SFTConfig(**training_arguments(recipe, stage, checkpoints), assistant_only_loss=True),
        train_dataset=_dialogues(records),
        eval_dataset=_dialogues(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=peft_config,  # type: ignore[arg-type]
    )
    trainer.configure(stage, len(records), len(held_out))
    return trainer


def sft_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    records: Sequence[Record],
    held_out: Sequence[Record],
    checkpoints: Path,
) -> TextTrainer:
    """The paper trains all parameters here; LoRA is for one small GPU."""
    stage = recipe.stages.sft
    return dialogue_trainer(model, tokenizer, recipe, stage, records, held_out, checkpoints, lora_config(stage))


def _dialogues(records: Sequence[Record]) -> Dataset:
    return Dataset.from_list(
        [{"messages": [message.model_dump() for message in record.messages or ()]} for record in records]
    )
