"""Stage 2, full-parameter SFT on dialogues: only the assistant's tokens are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trainer.corpus.record import Record
from trainer.mue import MueConfig
from trainer.recipe import Recipe, StageRecipe
from trainer.stages.common import training_arguments


def sft_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    stage: StageRecipe,
    records: Sequence[Record],
    checkpoints: Path,
    peft_config: MueConfig | None = None,
) -> SFTTrainer:
    """Our template marks the assistant's tokens with `{% generation %}`, which TRL turns into the loss mask."""
    rows = [{"messages": [message.model_dump() for message in record.messages or ()]} for record in records]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**training_arguments(recipe, stage, checkpoints), assistant_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,  # type: ignore[arg-type]
    )
