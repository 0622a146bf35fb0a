"""Rows of float32 encoded by ggml's own C code, so that a file written here is upstream's to the byte.

`ggml_quantize_chunk` is exported by llama-cpp-python's library but not bound by it. The library is opened by
its path: importing llama_cpp would load the whole engine into the exporting process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantize.errors import BadInput

_LIBRARY = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}
_HALF_MAX = 65504.0
# The largest magnitude a type can hold; a larger one would silently become infinity. Q8_0 keeps amax/127 as a half.
LARGEST = {
    GGMLQuantizationType.F16: _HALF_MAX,
    GGMLQuantizationType.BF16: 3.3895313892515355e38,
    GGMLQuantizationType.Q8_0: 127 * _HALF_MAX,
}


def encode(rows: np.ndarray, kind: GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows of finite float32 [rows, columns] (or [n]) as bytes, uint8 [rows, bytes per row].

    `importance`: float32 [columns], the weight of each column's error; types without a use for it ignore it.
    Raises ValueError when no whole block fits the columns. Releases the GIL while ggml works.
    """
    values = np.ascontiguousarray(rows, dtype=np.float32)
    values = values.reshape(-1, values.shape[-1])
    block, size = GGML_QUANT_SIZES[kind]
    count, columns = values.shape
    # ggml would end the process on these.
    if columns % block or (importance is not None and importance.shape != (columns,)):
        raise ValueError(f"rows of {columns} columns do not fit {kind.name}")
    if kind == GGMLQuantizationType.F32:
        return values.view(np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    encoded = np.empty((count, columns // block * size), np.uint8)
    written = _chunk()(
        int(kind),
        values.ctypes.data,
        encoded.ctypes.data,
        0,
        count,
        columns,
        weights.ctypes.data if weights is not None else None,
    )
    if written != encoded.nbytes:
        raise ValueError(f"ggml wrote {written} bytes of {kind.name} instead of {encoded.nbytes}")
    return encoded


@functools.cache
def _chunk() -> Any:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise BadInput("llama-cpp-python is not installed; pip install 'pediatricsgpt[quantize]'.")
    library = Path(spec.origin).parent / "lib" / _LIBRARY.get(sys.platform, "libggml-base.so")
    try:
        function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise BadInput(f"llama-cpp-python's {library.name} cannot be used ({error}); install it again.") from error
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    function.restype = ctypes.c_size_t
    return function
