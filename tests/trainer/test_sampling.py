"""The order of rows: every row once, decided by seed and epoch alone, like lengths together."""

from __future__ import annotations

import random

import pytest

from trainer.stages.sampling import EpochSampler

LENGTHS = [random.Random(5).randint(5, 500) for _ in range(1003)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("batch", [1, 8, 2000])
def test_every_row_comes_once_and_epochs_differ(lengths: list[int] | None, batch: int) -> None:
    sampler = EpochSampler(len(LENGTHS), batch, 3, lengths)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(len(LENGTHS)))
    if batch < len(LENGTHS) or lengths is None:
        assert first != second
    again = EpochSampler(len(LENGTHS), batch, 3, lengths)
    again.set_epoch(1)
    assert list(again) == second, "a resumed run must see the same rows"


def test_like_lengths_share_a_batch_and_the_longest_comes_first() -> None:
    batch = 8
    rows = list(EpochSampler(len(LENGTHS), batch, 3, LENGTHS))
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    padded = sum(max(LENGTHS[row] for row in part) * len(part) for part in batches)
    assert sum(LENGTHS) / padded > 0.95
    assert max(LENGTHS) in [LENGTHS[row] for row in batches[0]]
    assert len(batches[-1]) == len(LENGTHS) % batch, "only the last batch may be short"
