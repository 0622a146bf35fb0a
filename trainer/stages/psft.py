"""Stage 4, PSFT: parameter-efficient SFT of the three tasks with the mixture of universal-specific experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trainer.corpus.record import Record
from trainer.mue import MueConfig
from trainer.recipe import MueRecipe, Recipe
from trainer.stages.cpt import TextTrainer
from trainer.stages.sft import dialogue_trainer


def mue_config(stage: MueRecipe) -> MueConfig:
    """The adapter of a recipe's stage."""
    targets = stage.target_modules
    return MueConfig(
        r=stage.r,
        alpha=stage.alpha,
        num_specific=stage.num_specific,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def psft_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    records: Sequence[Record],
    held_out: Sequence[Record],
    checkpoints: Path,
) -> TextTrainer:
    """Dialogues of the consultation tasks; the base stays frozen."""
    stage = recipe.stages.mue
    return dialogue_trainer(model, tokenizer, recipe, stage, records, held_out, checkpoints, mue_config(stage))
