"""A merge as files: an ordinary PEFT LoRA, or a GGUF adapter that llama.cpp puts on top of a model."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import save_file

from quantize.architectures import TensorPlan
from quantize.errors import BadInput
from quantize.merging.factors import Merge


def save_lora(merge: Merge, folder: Path, base: str) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads, complete or not at all.

    `base`: name of the model it belongs to. alpha equals the rank, because B already holds the scale. Raises
    OSError when `folder` has something in it.
    """
    from peft import LoraConfig  # imports torch

    ranks = {module: merge.factors(module)[0].shape[0] for module in merge}
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(ranks),
        rank_pattern={module: own for module, own in ranks.items() if own != rank},
        alpha_pattern={module: own for module, own in ranks.items() if own != rank},
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {}
    for module in merge:
        for letter, matrix in zip("AB", merge.factors(module), strict=True):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = np.ascontiguousarray(matrix)
    try:
        config.save_pretrained(str(part))
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_gguf(path: Path, merge: Merge, architecture: str, plans: Sequence[TensorPlan], name: str) -> None:
    """Writes ``B A`` of every layer as a GGUF LoRA adapter, float32; rows of B in the order of the model's GGUF.

    Without `adapter.lora.alpha` llama.cpp's scale is 1. Raises BadInput for layers that the model lacks.
    """
    by_source: defaultdict[str, list[TensorPlan]] = defaultdict(list)
    for plan in plans:
        if plan.source:
            by_source[plan.source].append(plan)
    writer = GGUFWriter(path, architecture)
    try:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        for module in merge:
            a, b = merge.factors(module)
            targets = by_source.get(f"{module}.weight", [])
            if not targets:
                raise BadInput(f"The adapter's layer {module} is no matrix of the model; it was made for another base.")
            for plan in targets:
                rows = b[plan.source_rows(0, plan.shape[0])]
                writer.add_tensor(f"{plan.name}.lora_a", np.ascontiguousarray(a, np.float32))
                writer.add_tensor(f"{plan.name}.lora_b", np.ascontiguousarray(rows, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
