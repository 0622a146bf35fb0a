"""Stage 3, DFPO: direct following preference optimization.

The paper's loss is DPO's sigmoid loss plus μ times an SFT regulariser on the preferred answer, as in its code
(`dpo_ftx`: the mean over samples of each sample's mean negative log-likelihood).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trainer.corpus.record import Message, Record
from trainer.recipe import Recipe
from trainer.stages.common import training_arguments


def dfpo_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, records: Sequence[Record], checkpoints: Path
) -> DPOTrainer:
    """The reference policy is the model as SFT left it."""
    stage = recipe.stages.dfpo
    rows = [
        {name: _plain(getattr(record, name) or ()) for name in ("prompt", "chosen", "rejected")} for record in records
    ]
    return DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            **training_arguments(recipe, stage, checkpoints),
            beta=stage.beta,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, stage.sft_weight],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message.model_dump() for message in messages]
