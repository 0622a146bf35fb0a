"""The two kinds of weight files: safetensors, read without torch, and torch's older pickles. Both stay on disk."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from quantize.errors import BadInput

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Buffers that older versions of the models' code saved; llama.cpp computes them.
_BUFFER = re.compile(
    r".*\b(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(future|alibi)_mask|attention\.(masked_)?bias)"
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. `read()` maps it, read only: float32, or uint16 for both 16-bit types."""

    file: Path
    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def is_buffer(name: str) -> bool:
    """Whether a tensor is one of the tables that llama.cpp computes itself."""
    return _BUFFER.fullmatch(name) is not None


def open_file(file: Path) -> dict[str, Stored]:
    """Every tensor by name, without buffers that nobody needs. Raises BadInput for a missing or damaged file."""
    if not file.is_file():
        raise BadInput(f"{file} is missing; the weights are incomplete, copy them again or train the run again.")
    try:
        return _pickle(file) if file.suffix == ".bin" else _safetensors(file)
    except OSError as error:
        raise BadInput(
            f"{file} cannot be read ({error.strerror or error}); check the file's rights and its disk."
        ) from error


def _safetensors(file: Path) -> dict[str, Stored]:
    header, start = _header(file)
    found: dict[str, Stored] = {}
    end, size = 0, file.stat().st_size - start
    for begin, stop, name, dtype, shape in sorted(_entries(file, header), key=lambda entry: entry[:2]):
        # The format has neither holes nor overlaps, so anything else is damage.
        if begin != end or stop < begin or stop > size:
            raise _damaged(file, name)
        end = stop
        if is_buffer(name):
            continue
        if dtype not in ITEM_BYTES:
            raise _wrong_type(file, name, dtype)
        if not shape or 0 in shape or math.prod(shape) * ITEM_BYTES[dtype] != stop - begin:
            raise _damaged(file, name)
        found[name] = Stored(file, dtype, shape, _mapped(file, dtype, start + begin, shape))
    if end != size:
        raise _damaged(file, "its end")
    return found


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON object at the start of a safetensors file, and where the data begins."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_HEADER_BYTES, file.stat().st_size - 8):
            raise _unreadable(file, f"its header would be {length} bytes long")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, str(error)) from error
    if not isinstance(header, dict):
        raise _unreadable(file, "its header is no object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _entries(file: Path, header: dict[str, Any]) -> list[tuple[int, int, str, str, tuple[int, ...]]]:
    entries = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(file, f"{name!r} has no type, shape or place") from error
        if not all(type(value) is int and value >= 0 for value in (*shape, begin, stop)):
            raise _unreadable(file, f"{name!r} has an impossible shape or place")
        entries.append((begin, stop, name, str(dtype), shape))
    return entries


def _mapped(file: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    kind = np.float32 if dtype == "F32" else np.uint16
    # Mapped anew at every reading, so that pages of tensors already written are given back.
    return lambda: np.memmap(file, kind, "r", offset, shape)


def _pickle(file: Path) -> dict[str, Stored]:
    import torch

    if not zipfile.is_zipfile(file):
        raise BadInput(
            f"{file} is cut off, or from before torch 1.6; copy it again, or load it with torch and save it as "
            "safetensors."
        )
    try:
        # Without weights_only a downloaded pickle could run code.
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise BadInput(
            f"{file} holds more than tensors, and reading it could run foreign code; use the checkpoint's safetensors, "
            "or convert the file where you trust it."
        ) from error
    except (RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{file} cannot be read ({reason}); copy it again.") from error
    if not isinstance(loaded, dict):
        raise BadInput(f"{file} holds a {type(loaded).__name__} instead of tensors by name; save its state dict.")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    found: dict[str, Stored] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadInput(f"{file}: {name} is a {type(tensor).__name__}, no tensor; save the state dict alone.")
        if is_buffer(name):
            continue
        dtype = names.get(tensor.dtype)
        if dtype is None or tensor.layout != torch.strided:
            raise _wrong_type(file, name, str(tensor.dtype).removeprefix("torch."))
        if not tensor.ndim or not tensor.numel():
            raise _damaged(file, name)
        stored = tensor.detach() if dtype == "F32" else tensor.detach().view(torch.uint16)
        found[name] = Stored(file, dtype, tuple(tensor.shape), stored.numpy)
    return found


def _unreadable(file: Path, reason: str) -> BadInput:
    return BadInput(f"{file} is not a readable safetensors file ({reason}); copy it again or train the run again.")


def _damaged(file: Path, place: str) -> BadInput:
    return BadInput(f"{file} is cut off or damaged at {place}; copy it again or train the run again.")


def _wrong_type(file: Path, name: str, dtype: str) -> BadInput:
    return BadInput(f"{file}: {name} is {dtype}; only F32, F16 and BF16 weights can be exported, save it as BF16.")
