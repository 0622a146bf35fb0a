"""The header of a GGUF file, read by our own code so that a damaged file is refused, not crashed on.

Nothing here is allocated because a number in the file says so: every length is first compared with what is left.
The layout is that of ggml/docs/gguf.md (versions 2 and 3 are the same on disk); what is refused beyond it is what
llama.cpp refuses too (ggml/src/gguf.cpp), or aborts on (usable.py).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

Buffer = bytes | bytearray | mmap.mmap

MAX_KEYS, MAX_TENSORS, MAX_ARRAY, MAX_STRING = 4096, 65_536, 4_000_000, 16 << 20
_MAX_HEADER = 256 << 20
_MAX_KEY, _MAX_NAME, _MAX_DIMENSIONS, _MAX_ELEMENTS = 256, 63, 4, 2**63 - 1
# llama.cpp hands a mapped file to ggml, which insists on 32 bytes.
_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 16
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {code: struct.Struct("<" + letter) for code, letter in _LETTERS.items()}
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
_UINT32, _UINT64 = _SCALARS[4], _SCALARS[10]
_DIMENSIONS = {count: struct.Struct(f"<{count}QIQ") for count in range(1, _MAX_DIMENSIONS + 1)}
_TYPES = {int(kind): (kind, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


class Malformed(Exception):
    """The file is not a GGUF that can be used; the message says why."""


@dataclass(frozen=True)
class Array:
    """An array of the metadata, kept as the bytes of the file until somebody wants its items."""

    kind: int  # GGUF value type of the items
    count: int
    data: bytes

    def __len__(self) -> int:
        return self.count

    def pieces(self) -> list[bytes]:
        """The items of an array of strings."""
        unpack, data, position, pieces = _UINT64.unpack_from, self.data, 0, []
        for _ in range(self.count):
            stop = position + 8 + unpack(data, position)[0]
            pieces.append(data[position + 8 : stop])
            position = stop
        return pieces

    def list(self) -> list[Any]:
        """The items. Raises Malformed for strings that are not UTF-8."""
        if self.kind != STRING:
            return list(struct.unpack(f"<{self.count}{_LETTERS[self.kind]}", self.data))
        try:
            return [piece.decode("utf-8") for piece in self.pieces()]
        except UnicodeDecodeError as error:
            raise Malformed(f"an array holds text that is not UTF-8 ({error})") from error


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: numpy-order shape, type, absolute offset and size in bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """Metadata (arrays as `Array`), the GGUF value type of each key, and tensors by name.

    `strings`: where the text of each string value lies, as (offset, bytes).
    """

    path: Path
    metadata: dict[str, Any]
    kinds: dict[str, int]
    tensors: dict[str, Tensor]
    strings: dict[str, tuple[int, int]]

    @property
    def architecture(self) -> str:
        """The value of general.architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        """How many weights the file holds."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

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
    """Reads and checks a header. Raises Malformed naming the file and what is wrong, OSError when it is unreadable."""
    try:
        with _mapped(path) as data:
            return parse(data, path)
    except Malformed as error:
        raise named(error, path) from error


def named(error: Malformed, path: Path) -> Malformed:
    """The same cause with the file's name and the remedy, safe to print whatever the file holds."""
    cause = "".join(letter if letter.isprintable() else "?" for letter in str(error))
    return Malformed(f"{path.name}: {cause[:300]}; copy it again or export it again")


def parse(data: Buffer, path: Path) -> Header:
    """A header from the bytes of a whole file; `path` is only remembered. Raises Malformed."""
    try:
        return _parse(data, path)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise Malformed(f"the header is damaged ({error})") from error


def patch(path: Path, key: str, text: str) -> None:
    """Overwrites the text of a string value in place, padded with spaces to the length it has, and syncs the file.

    Raises ValueError when the key is no string or its place is too small, Malformed when the file is damaged.
    """
    place = read(path).strings.get(key)
    data = text.encode("utf-8")
    if place is None or len(data) > place[1]:
        raise ValueError(f"{path.name} has no room of {len(data)} bytes under {key}")
    with path.open("r+b") as file:
        file.seek(place[0])
        file.write(data.ljust(place[1]))
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 24:  # also: an empty file cannot be mapped
            raise Malformed("it is too short to be a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


class _Cursor:
    """Walks through the header; every length is compared with what is left before it is used."""

    def __init__(self, data: Buffer) -> None:
        self.data, self.position, self.end = data, 4, min(len(data), _MAX_HEADER)

    def take(self, size: int) -> int:
        """Moves on by `size` bytes and returns where they start."""
        start = self.position
        if size > self.end - start:
            raise Malformed("the header runs past the end of the file")
        self.position = start + size
        return start

    def scalar(self, layout: struct.Struct) -> Any:
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def text(self, limit: int, what: str) -> str:
        size = self.scalar(_UINT64)
        if size > limit:
            raise Malformed(f"the header claims {size} bytes for {what}")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8")

    def array(self, key: str) -> Array:
        kind, count = self.scalar(_UINT32), self.scalar(_UINT64)
        if count > MAX_ARRAY:
            raise Malformed(f"the header claims {count} items for {key}")
        if kind != STRING and kind not in _SCALARS:
            raise Malformed(f"{key} holds items of the unknown type {kind}")
        start = self.take(count * (8 if kind == STRING else _SCALARS[kind].size))
        if kind == STRING:
            self.position = self._past_strings(start, count)
        return Array(kind, count, bytes(self.data[start : self.position]))

    def _past_strings(self, position: int, count: int) -> int:
        unpack, data, last = _UINT64.unpack_from, self.data, self.end - 8
        for _ in range(count):
            if position > last:
                raise Malformed("a string runs past the end of the file")
            position += 8 + unpack(data, position)[0]
        if position > self.end:
            raise Malformed("a string runs past the end of the file")
        return position


def _parse(data: Buffer, path: Path) -> Header:
    if len(data) < 24 or data[:4] != b"GGUF":
        raise Malformed("it is not a GGUF file")
    cursor = _Cursor(data)
    version = cursor.scalar(_UINT32)
    if version not in (2, 3):
        raise Malformed(f"it is GGUF version {version}; 2 and 3 can be read")
    tensor_count, key_count = cursor.scalar(_UINT64), cursor.scalar(_UINT64)
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise Malformed(f"the header claims {tensor_count} tensors and {key_count} metadata keys")
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    strings: dict[str, tuple[int, int]] = {}
    for _ in range(key_count):
        key = cursor.text(_MAX_KEY, "a key")
        if not key or key in metadata or "\0" in key:  # llama.cpp compares keys as C strings
            raise Malformed(f"the key {key!r} is empty, occurs twice, or holds a zero byte")
        kind = kinds[key] = cursor.scalar(_UINT32)
        if kind == STRING:
            metadata[key] = cursor.text(MAX_STRING, key)
            size = len(metadata[key].encode())
            strings[key] = (cursor.position - size, size)
        elif kind == ARRAY:
            metadata[key] = cursor.array(key)
        elif kind in _SCALARS:
            metadata[key] = cursor.scalar(_SCALARS[kind])
        else:
            raise Malformed(f"{key} has the unknown type {kind}")
    return Header(path, metadata, kinds, _tensors(cursor, tensor_count, _alignment(metadata, kinds)), strings)


def _alignment(metadata: dict[str, Any], kinds: dict[str, int]) -> int:
    key = "general.alignment"
    value = metadata.get(key, _ALIGNMENT)
    if kinds.get(key, U32) != U32 or value & (value - 1) or not _ALIGNMENT <= value <= _MAX_ALIGNMENT:
        raise Malformed(f"{key} is {value!r}, no power of two between {_ALIGNMENT} and {_MAX_ALIGNMENT}")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    """The tensors; their data must follow each other without gap or overlap, as llama.cpp demands."""
    found: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]] = []
    following = 0
    for _ in range(count):
        name = cursor.text(_MAX_NAME, "a tensor's name")
        dimensions = cursor.scalar(_UINT32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS or "\0" in name:
            raise Malformed(f"the tensor {name!r} has {dimensions} dimensions or a zero byte in its name")
        layout = _DIMENSIONS[dimensions]
        *shape, code, offset = layout.unpack_from(cursor.data, cursor.take(layout.size))
        elements = math.prod(shape)
        if not 0 < elements <= _MAX_ELEMENTS:
            raise Malformed(f"the tensor {name} has the impossible shape {shape[::-1]}")
        if code not in _TYPES:
            raise Malformed(f"the tensor {name} has the unknown type {code}")
        kind, block, size = _TYPES[code]
        if shape[0] % block:
            raise Malformed(f"the rows of {name} ({shape[0]}) do not fill blocks of {block} ({kind.name})")
        if offset != following:
            raise Malformed(
                f"the data of {name} lies at {offset} instead of {following}: a gap, overlap or wrong order"
            )
        nbytes = elements // block * size
        following = -(-(offset + nbytes) // alignment) * alignment
        found.append((name, tuple(reversed(shape)), kind, offset, nbytes))
    base = -(-cursor.position // alignment) * alignment
    if found and base + found[-1][3] + found[-1][4] > len(cursor.data):
        raise Malformed(f"the data of {found[-1][0]} runs past the end of the file: it is not complete")
    tensors = {name: Tensor(shape, kind, base + offset, nbytes) for name, shape, kind, offset, nbytes in found}
    if len(tensors) != count:
        raise Malformed("a tensor's name occurs twice")
    return tensors
