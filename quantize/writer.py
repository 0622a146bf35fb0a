"""GGUF files written in row blocks on all cores, without ever holding the model, or one tensor of it, in memory."""

from __future__ import annotations

import contextlib
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    LlamaFileType,
)

from quantize.architectures import TensorPlan, Value
from quantize.checkpoint import Tensors
from quantize.encode import LARGEST, encode
from quantize.errors import BadInput

# Types encoded here; everything else is llama.cpp's own quantizer's (quantizer.py).
DIRECT = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_NAME_BYTES = 63  # ggml's limit of a tensor's name
_INFINITY = {GGMLQuantizationType.F16: np.uint16(0x7C00), GGMLQuantizationType.BF16: np.uint16(0x7F80)}
_ITEMS = {str: GGUFValueType.STRING, int: GGUFValueType.INT32, float: GGUFValueType.FLOAT32}
_MOST_THREADS = 16  # each holds some blocks in memory, and the disk is no faster for more
_BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32: small enough for the processor's cache, large enough for Python


class Merge(Protocol):
    """Anything that adds to the weights of some layers."""

    def delta_rows(self, module: str, rows: slice | np.ndarray) -> np.ndarray | None:
        """What is added to these rows (in the source's order), float32; None for a layer left as it is."""
        ...


class Weights:
    """The checkpoint's weights with a merge added, by rows of the GGUF's tensors."""

    def __init__(self, tensors: Tensors, merge: Merge | None) -> None:
        self._tensors = tensors
        self._merge = merge

    def rows(self, plan: TensorPlan, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of a tensor, float32. Raises BadInput when a value is not finite."""
        if plan.values is not None:
            return plan.values[start:stop]
        picked = plan.source_rows(start, stop)
        rows = self._tensors.rows(plan.source, picked)
        delta = self._delta(plan, picked)
        if delta is not None:
            rows += delta
        if plan.unit_rows:
            # The floor is torch.nn.functional.normalize's, which Baichuan2 calls: rows of zeros stay zeros.
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        if not np.isfinite(rows).all():
            raise _not_finite(plan)
        return rows

    def stored(self, plan: TensorPlan, kind: GGMLQuantizationType) -> np.ndarray | None:
        """The tensor's source as it lies on disk [source rows, …], when the file can take its rows unchanged."""
        if plan.values is not None or plan.unit_rows or self._delta(plan, slice(0, 1)) is not None:
            return None
        dtype, stored = self._tensors.raw(plan.source)
        return stored if dtype == kind.name else None

    def _delta(self, plan: TensorPlan, rows: slice | np.ndarray) -> np.ndarray | None:
        return None if self._merge is None else self._merge.delta_rows(plan.source.removesuffix(".weight"), rows)


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


def tensor_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """Size of a tensor in the file, without padding."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def padded(nbytes: int) -> int:
    """Rounded up to GGUF's alignment."""
    return -(-nbytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def available_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value],
    plans: Sequence[TensorPlan],
    weights: Weights,
    quant: str,
    progress: Callable[[int, int], None],
    *,
    threads: int | None = None,
    sync: bool = True,
) -> None:
    """Writes one GGUF of a type in `DIRECT`; `progress(done, total)` in bytes.

    Blocks of rows are read and encoded by `threads` threads (default: one per core) and written in order.

    Parameters:
        path: an unfinished file's name; whoever calls gives the final one.
        sync: wait until the file is on the disk; not needed for an intermediate that is removed again.

    Raises OSError when the disk is full, BadInput when a weight is not finite or too large for its type.
    """
    kinds = [tensor_type(plan, quant) for plan in plans]
    total = sum(tensor_bytes(plan.shape, kind) for plan, kind in zip(plans, kinds, strict=True))
    work = (task for plan, kind in zip(plans, kinds, strict=True) for task in _tasks(plan, kind, weights))
    done = 0
    blocks = _in_order(work, threads or min(_MOST_THREADS, available_cores()))
    with path.open("wb") as file, contextlib.closing(blocks):
        file.write(header_bytes(architecture, metadata, plans, kinds, DIRECT[quant]))
        for plan, kind in zip(plans, kinds, strict=True):
            size = tensor_bytes(plan.shape, kind)
            written = 0
            for _ in row_blocks(plan.shape):
                name, block = next(blocks)
                if name != plan.name:
                    raise ValueError(f"a block of {name} came when {plan.name} was written")
                # ndarray.tofile loses the reason of a failed write; file.write keeps it (disk full).
                written += file.write(block.data)
                progress(done + written, total)
            if written != size:
                raise ValueError(f"{plan.name}: wrote {written} bytes instead of {size}")
            file.write(bytes(padded(size) - size))
            done += size
        if sync:
            file.flush()
            os.fsync(file.fileno())


def header_bytes(
    architecture: str,
    metadata: Mapping[str, Value],
    plans: Sequence[TensorPlan],
    kinds: Sequence[GGMLQuantizationType],
    file_type: int,
) -> bytes:
    """All of a GGUF before the tensors' data, padding included.

    Not by GGUFWriter: it packs one value at a time (0.7 s for a Qwen vocabulary) and leaves empty ones out silently.
    Raises ValueError for what the format cannot hold.
    """
    values = {
        "general.architecture": architecture,
        **metadata,
        "general.file_type": int(file_type),
        "general.quantization_version": GGML_QUANT_VERSION,
    }
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(plans), len(values))]
    parts += [_string(key) + _value(key, value) for key, value in values.items()]
    offset = 0
    for plan, kind in zip(plans, kinds, strict=True):
        if len(plan.name.encode()) > _NAME_BYTES:
            raise ValueError(f"the tensor name {plan.name} is longer than {_NAME_BYTES} bytes")
        dimensions = plan.shape[::-1]
        parts.append(_string(plan.name))
        parts.append(struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset))
        offset += padded(tensor_bytes(plan.shape, kind))
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def _tasks(
    plan: TensorPlan, kind: GGMLQuantizationType, weights: Weights
) -> Iterator[Callable[[], tuple[str, np.ndarray]]]:
    """What makes each block of a tensor: (its name, its bytes)."""
    stored = weights.stored(plan, kind)
    for start, stop in row_blocks(plan.shape):
        if stored is None:
            yield partial(_encoded, plan, kind, weights, start, stop)
        else:
            yield partial(_copied, plan, kind, stored, start, stop)


def _encoded(
    plan: TensorPlan, kind: GGMLQuantizationType, weights: Weights, start: int, stop: int
) -> tuple[str, np.ndarray]:
    rows = weights.rows(plan, start, stop)
    if kind in LARGEST and (largest := max(rows.max(), -rows.min())) > LARGEST[kind]:
        raise BadInput(f"{plan.source} holds {largest:.3g}, too large for {kind.name}; choose --quant BF16 or F32.")
    return plan.name, encode(rows, kind).reshape(-1)


def _copied(
    plan: TensorPlan, kind: GGMLQuantizationType, stored: np.ndarray, start: int, stop: int
) -> tuple[str, np.ndarray]:
    rows = stored[plan.source_rows(start, stop)]
    # Without their sign, the 16-bit patterns from infinity upwards are what is not finite.
    finite = (rows << 1).max() < _INFINITY[kind] << 1 if kind in _INFINITY else np.isfinite(rows).all()
    if not finite:
        raise _not_finite(plan)
    return plan.name, rows.reshape(-1).view(np.uint8)


def _not_finite(plan: TensorPlan) -> BadInput:
    return BadInput(
        f"{plan.source} holds values that are not finite (NaN or infinity): the training diverged or the file is "
        "damaged; export an earlier checkpoint or copy this one again."
    )


def _in_order(
    tasks: Iterable[Callable[[], tuple[str, np.ndarray]]], threads: int
) -> Generator[tuple[str, np.ndarray], None, None]:
    """The tasks' results in their order, computed by a few threads that never run far ahead."""
    waiting: deque[Future[tuple[str, np.ndarray]]] = deque()
    with ThreadPoolExecutor(threads, "encode") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Value) -> bytes:
    """GGUF type and value of one entry; Python's type decides: int u32, float f32, lists i32, f32 or strings."""
    if isinstance(value, bool):
        return struct.pack("<I?", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        return _pack(key, "<II", GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    if not value:
        raise ValueError(f"{key} is empty; leave it out instead")
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    kind = _ITEMS.get(type(value[0]))
    if kind is None or any(type(item) is not type(value[0]) for item in value):
        raise ValueError(f"{key} must be a list of only strings, whole numbers or floats")
    prefix = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value))
    if kind == GGUFValueType.STRING:
        return prefix + b"".join(_string(item) for item in value)  # type: ignore[arg-type]
    return prefix + _pack(key, f"<{len(value)}{'i' if kind == GGUFValueType.INT32 else 'f'}", *value)


def _pack(key: str, form: str, *values: object) -> bytes:
    try:
        return struct.pack(form, *values)
    except struct.error as error:
        raise ValueError(f"{key} holds a number that its GGUF type cannot ({error})") from error
