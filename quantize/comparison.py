"""Distances between logits and between weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.header import Header
from quantize.writer import row_blocks

# Rows start:stop of a tensor by its GGUF name, float32.
RowsOf = Callable[[str, int, int], np.ndarray]

TIE = 1e-4  # logits closer than this may change places through rounding alone
_ROWS = 64
_SAMPLE_ELEMENTS = 4 << 20  # larger tensors are compared on evenly spread rows


@dataclass(frozen=True)
class LogitDistance:
    """Over all compared positions: mean and largest KL divergence in nats, and where the best token differs."""

    positions: int
    mean_kld: float
    max_kld: float
    mismatches: int
    ties: int

    @property
    def agreement(self) -> float:
        """Share of positions with the same best token; ties count as agreeing."""
        return 1.0 - self.mismatches / self.positions


def logit_distance(reference: Path, tested: Path, sequences: int) -> LogitDistance:
    """Compares logits-N.npy of two folders, N < `sequences`; KL(reference ‖ tested) at every position."""
    divergences: list[np.ndarray] = []
    mismatches = ties = 0
    for number in range(sequences):
        expected = np.load(reference / f"logits-{number}.npy", mmap_mode="r")
        found = np.load(tested / f"logits-{number}.npy", mmap_mode="r")
        if expected.shape != found.shape:
            raise ValueError(f"logits of sequence {number} have shapes {expected.shape} and {found.shape}")
        for start in range(0, len(expected), _ROWS):
            a = np.asarray(expected[start : start + _ROWS], dtype=np.float64)
            b = np.asarray(found[start : start + _ROWS], dtype=np.float64)
            log_a, log_b = _log_softmax(a), _log_softmax(b)
            divergences.append((np.exp(log_a) * (log_a - log_b)).sum(-1))
            rows = np.arange(len(a))
            best, other = a.argmax(-1), b.argmax(-1)
            differ = best != other
            # Not-a-number compares false: it must count as a mismatch, never as a tie.
            tie = differ & (a[rows, best] - a[rows, other] <= TIE) & np.isfinite(b).all(-1)
            ties += int(tie.sum())
            mismatches += int((differ & ~tie).sum() + (~differ & ~np.isfinite(b).all(-1)).sum())
    values = np.concatenate(divergences)
    return LogitDistance(len(values), float(values.mean()), float(values.max()), mismatches, ties)


def weight_errors(tested: Header, truth: RowsOf) -> dict[str, tuple[str, float]]:
    """Per tensor its type and its relative error ‖w − w_ref‖ / ‖w_ref‖ (infinite when not finite)."""
    errors = {}
    for name, tensor in tested.tensors.items():
        difference = norm = 0.0
        for start, stop in _sampled_blocks(tensor.shape):
            expected = truth(name, start, stop).astype(np.float64)
            found = tested.rows(name, start, stop).astype(np.float64)
            difference += float(np.square(found - expected).sum())
            norm += float(np.square(expected).sum())
        error = np.sqrt(difference / norm) if norm else np.sqrt(difference)
        errors[name] = (tensor.kind.name, float(error) if np.isfinite(error) else float("inf"))
    return errors


def _sampled_blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    if int(np.prod(shape)) <= _SAMPLE_ELEMENTS:
        return row_blocks(shape)
    rows = max(1, _SAMPLE_ELEMENTS // int(np.prod(shape[1:])) // 16)
    return [(int(start), int(start) + rows) for start in np.linspace(0, shape[0] - rows, 16)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
