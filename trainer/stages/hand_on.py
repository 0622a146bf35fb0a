"""What a stage leaves behind: a dense model with its tokenizer, or the MUE adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trainer.origin import set_ends
from trainer.recipe import DenseStage, StageRecipe
from trainer.stages.checkpoints import flush


def hand_on(trainer: Any, stage: StageRecipe, origin: Path | str | None, tokenizer: Path, target: Path) -> None:
    """Writes the stage's folder aside, flushes it to the disk and renames it; every process calls it.

    A LoRA is merged into `origin`, what the stage started from; `tokenizer` is the run's tokenizer folder.
    """
    processes = PartialState()
    part = target.with_name(f"{target.name}.part")
    if processes.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    processes.wait_for_everyone()
    trainer.save_model(str(part))  # every process: sharded weights are gathered
    unset_hf_deepspeed_config()  # or what is loaded from here on would be sharded for an engine that has ended
    if processes.is_main_process:
        if isinstance(stage, DenseStage) and stage.method == "lora":
            assert origin is not None
            _merge_lora(origin, part, trainer.processing_class)
        for extra in [part / "training_args.bin", part / "README.md", *part.glob("*token*"), *part.glob("*.jinja")]:
            extra.unlink(missing_ok=True)
        if isinstance(stage, DenseStage):
            shutil.copytree(tokenizer, part, dirs_exist_ok=True)
        for path in part.iterdir():
            flush(path)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        flush(target.parent)
    processes.wait_for_everyone()


def _merge_lora(base: Path | str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Puts `base` with the adapter in `folder` merged into `folder`.

    The base is read in the dtype it is stored in, also after QLoRA: the adapter was trained over the 4-bit weights
    and is added to the exact ones, as PEFT and the QLoRA authors do.
    """
    adapter = folder.with_name(f"{folder.name}.lora.part")
    shutil.rmtree(adapter, ignore_errors=True)
    folder.rename(adapter)
    dense = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    set_ends(dense, tokenizer)
    PeftModel.from_pretrained(dense, str(adapter)).merge_and_unload(safe_merge=True).save_pretrained(folder)
    shutil.rmtree(adapter)
