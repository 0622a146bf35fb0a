"""Safetensors read by memory map, row block by row block, without importing torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.utility import LocalTensor, SafetensorsLocal

from quantize.architectures import TensorPlan
from quantize.errors import BadInput
from quantize.run_folder import read_object

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class Tensors:
    """The tensors of one or several safetensors files; data stays on disk until rows are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._tensors: dict[str, LocalTensor] = {}
        for file in files:
            for name, tensor in _index(file).items():
                if name in self._tensors:
                    raise BadInput(f"{file} repeats the tensor {name}; the checkpoint is damaged, save it again.")
                self._tensors[name] = tensor

    def __iter__(self):
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start:stop (first dimension) as float32, whatever the stored type."""
        tensor = self._tensors[name]
        raw = tensor.mmap_bytes()
        if tensor.dtype == "BF16":
            # A bfloat16 is the upper half of a float32.
            bits = raw.view(np.uint16).reshape(tensor.shape)[start:stop].astype(np.uint32)
            return (bits << 16).view(np.float32)
        dtype = np.float32 if tensor.dtype == "F32" else np.float16
        return raw.view(dtype).reshape(tensor.shape)[start:stop].astype(np.float32)

    def array(self, name: str) -> np.ndarray:
        """The whole tensor as float32."""
        return self.rows(name, 0, self._tensors[name].shape[0])


class Checkpoint:
    """A Hugging Face checkpoint folder: configuration and tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_object(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted({folder / name for name in read_object(index).get("weight_map", {}).values()})
        else:
            files = [folder / "model.safetensors"]
        self.tensors = Tensors(files)

    def check(self, plans: Sequence[TensorPlan]) -> None:
        """Every planned tensor is present in its shape, and every present tensor is planned exactly once.

        Raises BadInput otherwise: a tensor left out loads fine in llama.cpp and answers nonsense.
        """
        planned = [plan.source for plan in plans]
        missing = sorted(set(planned) - set(self.tensors))
        extra = sorted(set(self.tensors) - set(planned))
        twice = sorted({name for name in planned if planned.count(name) > 1})
        for problem, names in (
            ("is missing", missing),
            ("is not known", extra),
            ("would be used twice", twice),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise BadInput(
                    f"{self.folder}: the tensor {names[0]}{more} {problem}; the weights do not belong to the "
                    f"architecture in config.json, so export the checkpoint again."
                )
        for plan in plans:
            if self.tensors.shape(plan.source) != plan.shape:
                raise BadInput(
                    f"{self.folder}: {plan.source} has shape {self.tensors.shape(plan.source)} but config.json "
                    f"says {plan.shape}; export the checkpoint again."
                )


def _index(file: Path) -> dict[str, LocalTensor]:
    if not file.is_file():
        raise BadInput(f"{file} is missing; the checkpoint is incomplete, train the run again.")
    try:
        tensors = SafetensorsLocal(file).tensors
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError, json.JSONDecodeError) as error:
        raise BadInput(f"{file} is not a readable safetensors file ({error}); train the run again.") from error
    size = file.stat().st_size
    for name, tensor in tensors.items():
        if tensor.dtype not in _ITEM_BYTES:
            raise BadInput(f"{file}: {name} is {tensor.dtype}; only F32, F16 and BF16 weights can be exported.")
        expected = int(np.prod(tensor.shape)) * _ITEM_BYTES[tensor.dtype]
        end = tensor.data_range.offset + tensor.data_range.size
        if not tensor.shape or tensor.data_range.size != expected or end > size:
            raise BadInput(f"{file} is cut off or damaged at {name}; copy it again or train the run again.")
    return tensors
