"""The header of a GGUF file, read by our own code so that a damaged file is refused, not crashed on."""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

_ALIGNMENT = 32
_LIMITS = {"metadata keys": 4096, "tensors": 65_536, "array": 4_000_000, "string": 16 << 20}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Malformed(Exception):
    """The file is not a well-formed GGUF."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: numpy-order shape, type, absolute offset and size in bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata (arrays as their length only) and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of a matrix (or entries of a vector), dequantized to float32."""
        tensor = self.tensors[name]
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, (rows, tensor.nbytes // rows))
        if len(tensor.shape) == 1:
            return dequantize(np.array(raw[0]), tensor.kind)[start:stop]
        return dequantize(np.array(raw[start:stop]), tensor.kind)

    def types(self) -> dict[str, int]:
        """How many tensors have which type."""
        return dict(Counter(tensor.kind.name for tensor in self.tensors.values()).most_common())


def read(path: Path) -> Header:
    """Reads and checks a header. Raises Malformed with the place that is wrong."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise Malformed(f"{path.name} is too short to be a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, data)
            except (struct.error, UnicodeDecodeError, ValueError) as error:
                raise Malformed(f"{path.name} has a damaged header ({error})") from error


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.position = data, 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self.position)[0]
        self.position += struct.calcsize("<" + code)
        return value

    def count(self, what: str, code: str = "Q") -> int:
        value = self.scalar(code)
        if value > _LIMITS[what] or self.position > len(self._data):
            raise Malformed(f"the header claims {value} for {what}")
        return value

    def string(self) -> str:
        length = self.count("string")
        if self.position + length > len(self._data):
            raise Malformed("a string runs past the end of the file")
        text = self._data[self.position : self.position + length].decode("utf-8")
        self.position += length
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind]) if kind in _SCALARS else _unknown(kind)
        item = self.scalar("I")
        length = self.count("array")
        if item == _STRING:
            for _ in range(length):
                size = self.count("string")  # moves the position itself, so not inside the addition
                self.position += size
        elif item in _SCALARS:
            self.position += length * struct.calcsize("<" + _SCALARS[item])
        else:
            _unknown(item)
        return length


def _unknown(kind: int) -> Any:
    raise Malformed(f"the header uses the unknown value type {kind}")


def _parse(path: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise Malformed(f"{path.name} is not a GGUF file")
    cursor.position = 4
    version = cursor.scalar("I")
    if version != 3:
        raise Malformed(f"{path.name} is GGUF version {version}, only 3 is written here")
    tensor_count, key_count = cursor.count("tensors"), cursor.count("metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        if key in metadata:
            raise Malformed(f"the key {key} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    places: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int, int]] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.scalar("I")
        if name in places or not 1 <= dimensions <= 4:
            raise Malformed(f"the tensor {name} occurs twice or has {dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        kind = GGMLQuantizationType(cursor.scalar("I"))
        block, size = GGML_QUANT_SIZES[kind]
        places[name] = (shape, kind, cursor.scalar("Q"), math.prod(shape) // block * size)
    base = -(-cursor.position // _ALIGNMENT) * _ALIGNMENT
    tensors = {
        name: Tensor(shape, kind, base + offset, nbytes) for name, (shape, kind, offset, nbytes) in places.items()
    }
    _check_places(tensors, base, len(data))
    return Header(path, metadata, tensors)


def _check_places(tensors: dict[str, Tensor], base: int, size: int) -> None:
    end = base
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % _ALIGNMENT or tensor.offset < end or tensor.offset + tensor.nbytes > size:
            raise Malformed(f"the data of {name} overlaps, is misaligned, or runs past the end of the file")
        end = tensor.offset + tensor.nbytes
