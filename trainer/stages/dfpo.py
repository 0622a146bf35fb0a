"""Stage 3, DFPO: direct following preference optimization.

The paper's loss is DPO's sigmoid loss plus μ times an SFT regulariser on the preferred answer. TRL has such a term
("sft"), but averages it over the tokens of the batch; the paper's code (`dpo_ftx` in its DPO trainer) averages each
sample first, so that short answers count as much as long ones. `DfpoTrainer` does the latter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, load_from_disk
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from trainer.corpus.record import Record
from trainer.recipe import Recipe
from trainer.stages.adapters import lora_config
from trainer.stages.arguments import training_arguments
from trainer.stages.loop import StageLoop


def sft_regulariser(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Mean over samples of each sample's mean negative log-likelihood.

    `log_probs` [samples, tokens] of the completion's tokens (anything elsewhere), `completion_mask` likewise.
    """
    mask = completion_mask.to(log_probs.dtype)
    return (-(log_probs * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


class DfpoTrainer(StageLoop, DPOTrainer):
    """DPO plus `sft_weight` times `sft_regulariser` on the chosen answers."""

    def __init__(self, *args: Any, sft_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sft_weight = sft_weight

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        # The policy's per-token log-probabilities are local to TRL's method; a hook on its forward keeps them.
        policy: list[Any] = []
        hook = model.register_forward_hook(lambda module, given, output: policy.append(output))
        try:
            loss = super()._compute_loss(model, inputs, False)
        finally:
            hook.remove()
        mask = inputs["completion_mask"][:, 1:]
        log_probs = policy[0].log_probs[:, -mask.size(1) :]
        chosen = mask.size(0) // 2  # a batch is [chosen, rejected]
        loss = loss + self.sft_weight * sft_regulariser(log_probs[:chosen], mask[:chosen])
        return (loss, policy[0]) if return_outputs else loss

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The reference's log-probabilities of DFPO, worked out by all processes and written by the main one.

        TRL puts the file beside the dataset's own. A dataset that lives in memory has none, so its file would lie in
        a temporary folder that every process has for itself; in the stage's folder all find it, also after a resume.
        """
        folder = Path(str(self.args.output_dir)) / f"references-{name}"
        if self.accelerator.is_main_process:
            dataset.save_to_disk(folder)
        self.accelerator.wait_for_everyone()
        return super()._precompute_ref_logps(cast(Dataset, load_from_disk(folder)), name, batch_size)


def dfpo_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    records: Sequence[Record],
    held_out: Sequence[Record],
    checkpoints: Path,
) -> DfpoTrainer:
    """The reference policy is the model as SFT left it: its log-probabilities are computed once before the first
    step; without `precompute_reference` a copy (or the model with its LoRA off) answers at every step."""
    stage = recipe.stages.dfpo
    lora = lora_config(stage)
    # Before its first step FSDP has a model with LoRA still on the CPU; switched off it answers at every step.
    precompute = stage.precompute_reference and not (lora and parse_flag_from_env("ACCELERATE_USE_FSDP"))
    trainer = DfpoTrainer(
        model=model,
        ref_model=None if lora or precompute else copy.deepcopy(model),
        args=DPOConfig(
            **training_arguments(recipe, stage, checkpoints),
            beta=stage.beta,
            loss_type=["sigmoid"],
            precompute_ref_log_probs=precompute,
        ),
        train_dataset=_pairs(records),
        eval_dataset=_pairs(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora,
        sft_weight=stage.sft_weight,
    )
    trainer.configure(stage, len(records), len(held_out))
    return trainer


def _pairs(records: Sequence[Record]) -> Dataset:
    return Dataset.from_list(
        [
            {name: [m.model_dump() for m in getattr(record, name) or ()] for name in ("prompt", "chosen", "rejected")}
            for record in records
        ]
    )
