"""LoRA in the dense stages: trained beside frozen weights and merged when the stage ends."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

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


def merge_lora(base: Path | str, adapter: Path, target: Path) -> None:
    """Writes `base` with `adapter` merged into `target`.

    The base is read in the dtype it is stored in, also after QLoRA: the adapter was trained over the 4-bit weights
    and is added to the exact ones, as PEFT and the QLoRA authors do.
    """
    dense = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    PeftModel.from_pretrained(dense, adapter).merge_and_unload(safe_merge=True).save_pretrained(target)
