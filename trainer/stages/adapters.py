"""LoRA in the dense stages: trained beside frozen weights and merged when the stage ends (hand_on.py)."""

from __future__ import annotations

from peft import LoraConfig

from trainer.recipe import DenseStage


def lora_config(stage: DenseStage) -> LoraConfig | None:
    """PEFT's configuration, None for full-parameter training."""
    if stage.method == "full":
        return None
    return LoraConfig(
        r=stage.lora_r,
        lora_alpha=stage.lora_alpha,
        target_modules=list(stage.lora_targets),
        task_type="CAUSAL_LM",
    )
