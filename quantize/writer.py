"""GGUF files written tensor by tensor, in row blocks, without ever holding the model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from quantize.architectures import TensorPlan, Value
from quantize.checkpoint import Tensors
from quantize.errors import BadInput
from quantize.experts import Merge

# Types encoded here; everything else is llama.cpp's own quantizer's (quantizer.py).
DIRECT = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK_ELEMENTS = 8 << 20  # 32 MiB of float32 per block


class Weights:
    """The checkpoint's weights with the experts folded in, float32, by rows."""

    def __init__(self, tensors: Tensors, merge: Merge) -> None:
        self._tensors = tensors
        self._merge = merge

    def rows(self, plan: TensorPlan, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of a tensor. Raises BadInput when a merged value is not finite."""
        rows = self._tensors.rows(plan.source, start, stop)
        delta = self._merge.delta_rows(plan.source.removesuffix(".weight"), start, stop)
        if delta is not None:
            rows = rows + delta
        if not np.isfinite(rows).all():
            raise BadInput(
                f"{plan.source} holds values that are not finite; the training diverged, train the run again."
            )
        return rows


def row_blocks(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Row ranges that cover a tensor in blocks of bounded size."""
    rows = shape[0]
    step = max(1, _BLOCK_ELEMENTS // max(1, int(np.prod(shape[1:]))))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def tensor_type(plan: TensorPlan, quant: str) -> GGMLQuantizationType:
    """The stored type: norms F32, matrices the file's type; rows no block fits take F16."""
    if not plan.is_matrix:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[quant]
    return kind if plan.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    plans: Sequence[TensorPlan],
    weights: Weights,
    quant: str,
    progress: Callable[[int, int], None],
) -> None:
    """Writes one GGUF of a type in `DIRECT` and syncs it to disk; `progress(done, total)` in bytes.

    Raises OSError when the disk is full, BadInput when a weight is not finite.
    """
    writer = GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        writer.add_file_type(DIRECT[quant])
        writer.add_quantization_version(2)
        sizes = [_nbytes(plan, quant) for plan in plans]
        for plan, nbytes in zip(plans, sizes, strict=True):
            kind = tensor_type(plan, quant)
            writer.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for plan, nbytes in zip(plans, sizes, strict=True):
            # The writer takes tensors by position only; the name is ours to compare.
            if next(iter(writer.tensors[0])) != plan.name:
                raise ValueError(f"tensor {plan.name} is out of order")
            writer.write_tensor_data(_Stream(plan, weights, quant, nbytes))  # type: ignore[arg-type]
            done += nbytes
            progress(done, sum(sizes))
        if writer.fout is not None:
            writer.fout[0].flush()
            os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()


class _Stream:
    """What GGUFWriter needs of an array (`nbytes`, `tofile`), encoded while it is written."""

    def __init__(self, plan: TensorPlan, weights: Weights, quant: str, nbytes: int) -> None:
        self.nbytes = nbytes
        self._plan, self._weights, self._kind = plan, weights, tensor_type(plan, quant)

    def tofile(self, file: IO[bytes]) -> None:
        written = 0
        for start, stop in row_blocks(self._plan.shape):
            encoded = quantize(self._weights.rows(self._plan, start, stop), self._kind)
            # ndarray.tofile loses the reason of a failed write; file.write keeps it (disk full).
            written += file.write(np.ascontiguousarray(encoded).view(np.uint8).data)
        if written != self.nbytes:
            raise ValueError(f"{self._plan.name}: wrote {written} bytes instead of {self.nbytes}")


def _nbytes(plan: TensorPlan, quant: str) -> int:
    block, size = GGML_QUANT_SIZES[tensor_type(plan, quant)]
    return int(np.prod(plan.shape)) // block * size


def _add(writer: GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif not value:
        raise ValueError(f"{key} is empty; the GGUF writer would leave it out silently")
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
