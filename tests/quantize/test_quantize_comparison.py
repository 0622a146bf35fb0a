"""Distances against hand computations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from quantize.comparison import logit_distance
from quantize.writer import row_blocks


def save(folder: Path, rows: list[list[float]]) -> Path:
    folder.mkdir()
    np.save(folder / "logits-0.npy", np.array(rows, dtype=np.float32))
    return folder


def test_kl_divergence_and_agreement(tmp_path: Path) -> None:
    reference = save(tmp_path / "a", [[math.log(3), 0.0], [0.0, 5.0]])
    tested = save(tmp_path / "b", [[0.0, math.log(3)], [0.0, 5.0]])
    distance = logit_distance(reference, tested, 1)
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    assert distance.max_kld == pytest.approx(expected, rel=1e-6)
    assert distance.mean_kld == pytest.approx(expected / 2, rel=1e-6)
    assert (distance.mismatches, distance.ties, distance.agreement) == (1, 0, 0.5)


def test_a_near_tie_is_not_a_mismatch_but_counted(tmp_path: Path) -> None:
    reference = save(tmp_path / "a", [[1.0, 1.00005, -3.0], [1.0, 1.001, -3.0]])
    tested = save(tmp_path / "b", [[1.00002, 1.0, -3.0], [1.00002, 1.0, -3.0]])
    distance = logit_distance(reference, tested, 1)
    assert (distance.mismatches, distance.ties) == (1, 1)


def test_not_a_number_never_agrees(tmp_path: Path) -> None:
    reference = save(tmp_path / "a", [[1.0, 0.0]])
    tested = save(tmp_path / "b", [[math.nan, 0.0]])
    distance = logit_distance(reference, tested, 1)
    assert distance.mismatches == 1
    assert not distance.mean_kld <= 1e9


def test_row_blocks_cover_every_row_once_within_bounds() -> None:
    blocks = row_blocks((151_936, 1024))
    assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (0, 151_936)
    assert max(stop - start for start, stop in blocks) * 1024 * 4 <= 32 << 20
    assert row_blocks((7,)) == [(0, 7)]
