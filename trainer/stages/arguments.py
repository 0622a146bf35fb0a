"""The training arguments that all stages share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.origin import on_gpu
from trainer.recipe import PackedStage, Recipe, StageRecipe

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}


def training_arguments(recipe: Recipe, stage: StageRecipe, checkpoints: Path) -> dict[str, Any]:
    """Keyword arguments for every TRL config of ours."""
    gpu = on_gpu(recipe)
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps or -1,
        "per_device_train_batch_size": stage.batch_size,
        "per_device_eval_batch_size": stage.batch_size,
        "gradient_accumulation_steps": stage.gradient_accumulation,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": _OPTIMIZERS[stage.optimizer],
        "max_length": stage.max_length,
        "logging_steps": stage.log_every,
        # A number that is not one must be seen, not averaged away.
        "logging_nan_inf_filter": False,
        "save_steps": stage.save_every,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "bf16": recipe.bf16,
        "use_cpu": not gpu,
        "activation_checkpointing": stage.activation_checkpointing,
        "disable_tqdm": True,
        "report_to": list(recipe.loggers),
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": 7200,  # rank 0 writes checkpoints and samples while the others wait
    }
    if isinstance(stage, PackedStage) and stage.packing:
        # CPT's texts were split before, none of their tokens is lost (stages/cpt.py); dialogues are cut at max_length.
        arguments |= {"packing": True, "packing_strategy": "bfd", "eval_packing": False}
    if stage.evaluate_every:
        arguments |= {"eval_strategy": "steps", "eval_steps": stage.evaluate_every}
    if stage.keep == "best" or stage.patience:
        arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    if stage.keep == "best":
        arguments["load_best_model_at_end"] = True
    return arguments
