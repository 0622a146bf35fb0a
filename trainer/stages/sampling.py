"""The order of a stage's rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_MEGABATCH = 50  # batches that are sorted by length together


class EpochSampler(Sampler[int]):
    """Row numbers in an order that (seed, epoch) alone decide, so a run resumed in any epoch sees the same batches.

    With `lengths`, rows of like length share a batch, because padding is the waste of short dialogues; the batches
    themselves come in random order, the one with the longest row first, so that memory that does not suffice is
    found at the first step. (transformers' LengthGroupedSampler draws from the global generator instead.)
    """

    def __init__(self, rows: int, batch: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.batch = batch
        self.seed = seed
        self.lengths = lengths
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        lengths = self.lengths
        if lengths is None:
            return iter(order)
        size = self.batch * _MEGABATCH
        by_length = [
            row
            for start in range(0, len(order), size)
            for row in sorted(order[start : start + size], key=lengths.__getitem__, reverse=True)
        ]
        batches = [by_length[start : start + self.batch] for start in range(0, len(by_length), self.batch)]
        tail = [batches.pop()] if len(batches[-1]) < self.batch and len(batches) > 1 else []
        longest = max(range(len(batches)), key=lambda index: max(lengths[row] for row in batches[index]))
        first = batches.pop(longest)
        shuffled = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for batch in [first, *shuffled, *tail] for row in batch])
