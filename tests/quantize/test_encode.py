"""The encoders against gguf's independent numpy ones."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from quantize import encode as module
from quantize.encode import LARGEST, encode


def edge_values() -> np.ndarray:
    """Rows of 32: ties of each rounding, subnormals of float32 and float16, signed zeros, one spike, the largest."""
    random = np.random.default_rng(0)
    halves = np.arange(32, dtype=np.float32) - 15.5
    halves[0] = 127.0  # Q8_0's scale is then 1, every other value a tie
    bits = (np.arange(32, dtype=np.uint32) << 16) + 0x3F808000  # exactly between two bfloat16
    between = np.float32(1) + (2 * np.arange(32, dtype=np.float32) + 1) / 2048  # and between two float16
    rows = [
        halves,
        bits.view(np.float32),
        between,
        np.full(32, np.finfo(np.float32).smallest_subnormal, np.float32),
        np.linspace(-6e-8, 6e-8, 32, dtype=np.float32),
        np.linspace(1e-40, 1e-38, 32, dtype=np.float32),
        np.where(np.arange(32) % 2, 0.0, -0.0).astype(np.float32),
        np.eye(1, 32, 7, dtype=np.float32)[0] * 60000,
        np.full(32, 65504, np.float32),
        *random.standard_normal((400, 32)).astype(np.float32)
        * np.geomspace(1e-30, 1e4, 400, dtype=np.float32)[:, None],
    ]
    return np.stack(rows)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_equals_the_independent_encoder_to_the_byte(kind: Kind) -> None:
    rows = edge_values()
    wide = rows[:200].reshape(25, 256)
    with np.errstate(all="ignore"):  # one over a subnormal scale
        expected = [gguf.quants.quantize(values, kind).view(np.uint8) for values in (rows, wide)]
    assert np.array_equal(encode(rows, kind), expected[0].reshape(len(rows), -1))
    assert np.array_equal(encode(wide, kind), expected[1].reshape(len(wide), -1))


def test_a_vector_and_rows_that_are_not_contiguous() -> None:
    rows = edge_values()
    assert np.array_equal(encode(rows[3], Kind.BF16)[0], encode(rows, Kind.BF16)[3])
    assert np.array_equal(encode(rows[::-3], Kind.Q8_0), encode(rows[::-3].copy(), Kind.Q8_0))
    assert np.array_equal(encode(rows.astype(np.float64), Kind.Q8_0), encode(rows, Kind.Q8_0))


@pytest.mark.parametrize(("columns", "kind"), [(33, Kind.Q8_0), (64, Kind.Q4_K), (16, Kind.Q4_0)])
def test_rows_without_a_whole_block_are_refused(columns: int, kind: Kind) -> None:
    """ggml's own answer would be to end the process."""
    with pytest.raises(ValueError, match="do not fit"):
        encode(np.zeros((2, columns), np.float32), kind)
    with pytest.raises(ValueError, match="do not fit"):
        encode(np.zeros((2, 256), np.float32), Kind.Q4_K, importance=np.ones(255, np.float32))


@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_value_survives_and_the_next_would_not(kind: Kind) -> None:
    def decoded(value: float) -> float:
        return float(gguf.quants.dequantize(encode(np.full((1, 32), value, np.float32), kind), kind)[0, 0])

    assert decoded(LARGEST[kind]) == pytest.approx(LARGEST[kind], rel=1e-2)
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(decoded(min(LARGEST[kind] * 1.004, float(np.finfo(np.float32).max))))


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.IQ4_XS])
def test_importance_moves_the_error_to_columns_that_matter_less(kind: Kind) -> None:
    random = np.random.default_rng(1)
    rows = random.standard_normal((64, 256)).astype(np.float32)
    importance = random.exponential(size=256).astype(np.float32) ** 3

    def weighted(encoded: np.ndarray) -> float:
        return float((importance * (gguf.quants.dequantize(encoded, kind) - rows) ** 2).mean())

    assert weighted(encode(rows, kind, importance)) < 0.9 * weighted(encode(rows, kind))


def test_contract_ggml_quantize_chunk() -> None:
    """The function is exported by the library beside the bindings, takes and returns what is declared."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))
    assert hasattr(ctypes.CDLL(str(library)), "ggml_quantize_chunk")
    assert not hasattr(llama_cpp, "ggml_quantize_chunk")  # once it is bound, the bindings' own is the better one
    function = module._chunk()
    rows, encoded = np.ones((3, 64), np.float32), np.zeros((3, 68), np.uint8)
    assert function(int(Kind.Q8_0), rows.ctypes.data, encoded.ctypes.data, 0, 3, 64, None) == encoded.nbytes
