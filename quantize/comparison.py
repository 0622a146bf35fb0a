"""Distances between logits, block by block as they are computed, and between weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from quantize import limits
from quantize.header import Header
from quantize.writer import row_blocks

# Rows start:stop of a tensor by its GGUF name, float32.
RowsOf = Callable[[str, int, int], np.ndarray]

_ELEMENTS = 1 << 20  # logits in float64 at a time: 8 MiB per intermediate result
_SAMPLE_ELEMENTS = 4 << 20  # larger quantized tensors are compared on evenly spread rows


@dataclass(frozen=True)
class LogitDistance:
    """KL(reference ‖ tested) in nats over all compared positions, and what changes for a reader.

    `mismatches`: another best token, `ties` not counted. `rms_dp`: root mean square change of the probability of the
    token that follows in the text. `perplexity`: of the reference and of the tested model, per token of the text.
    """

    positions: int
    mean_kld: float
    median_kld: float
    kld_99: float
    max_kld: float
    mismatches: int
    ties: int
    rms_dp: float
    perplexity: tuple[float, float]

    @property
    def agreement(self) -> float:
        """Share of positions with the same best token; ties count as agreeing."""
        return 1.0 - self.mismatches / self.positions

    @property
    def perplexity_ratio(self) -> float:
        """Tested over reference."""
        return self.perplexity[1] / self.perplexity[0]


class Track:
    """What one model says about fixed sequences, filled block by block.

    Of every position the best token and the loss (nats) of the token that follows; the logits themselves only of the
    first `budget` positions, as float32 in `folder`/logits-N.npy [kept positions, vocabulary].
    """

    def __init__(self, sequences: Sequence[list[int]], folder: Path | None = None, budget: int = 0) -> None:
        self.sequences = [np.array(ids, dtype=np.int64) for ids in sequences]
        self.best = [np.full(len(ids), -1, dtype=np.int64) for ids in sequences]
        self.loss = [np.full(len(ids) - 1, np.nan) for ids in sequences]
        self.kept: list[int] = []
        self._folder = folder
        for ids in sequences:
            self.kept.append(min(len(ids), max(0, budget)) if folder else 0)
            budget -= len(ids)

    def add(self, number: int, start: int, logits: np.ndarray) -> None:
        """Takes the logits [rows, vocabulary] of the positions from `start` of sequence `number`."""
        rows = len(logits)
        self.best[number][start : start + rows] = logits.argmax(-1)
        following = self.sequences[number][start + 1 : start + 1 + rows]
        for first, part in _parts(logits[: len(following)]):
            # float32 is enough for a loss, and several times faster on the largest vocabularies.
            highest = part.max(-1)
            with np.errstate(invalid="ignore"):  # a broken model may say anything
                total = np.exp(part - highest[:, None]).sum(-1, dtype=np.float64)
            wanted = part[np.arange(len(part)), following[first : first + len(part)]]
            self.loss[number][start + first : start + first + len(part)] = np.log(total) + (highest - wanted)
        keep = min(rows, self.kept[number] - start)
        if self._folder and keep > 0:
            self._file(number, logits.shape[1])[start : start + keep] = logits[:keep]

    def logits(self, number: int, start: int, stop: int) -> np.ndarray | None:
        """The kept logits of these positions, or as many of them as were kept; None when none were."""
        stop = min(stop, self.kept[number])
        if self._folder is None or start >= stop:
            return None
        return np.load(self._folder / f"logits-{number}.npy", mmap_mode="r")[start:stop]

    def first(self, count: int) -> Track:
        """The first `count` sequences alone; they share everything with this track."""
        part = Track([], self._folder)
        part.sequences, part.kept = self.sequences[:count], self.kept[:count]
        part.best, part.loss = self.best[:count], self.loss[:count]
        return part

    def _file(self, number: int, vocabulary: int) -> np.ndarray:
        assert self._folder is not None
        path = self._folder / f"logits-{number}.npy"
        if path.exists():
            return np.load(path, mmap_mode="r+")
        return np.lib.format.open_memmap(path, "w+", np.float32, (self.kept[number], vocabulary))


class Comparison:
    """The distance of a model from a track, accumulated while the tested model's blocks come in."""

    def __init__(self, reference: Track, tie: float) -> None:
        self._reference, self._tie = reference, tie
        self._tested = Track([ids.tolist() for ids in reference.sequences])
        self._klds: list[np.ndarray] = []
        self._changes: list[np.ndarray] = []
        self._mismatches = self._ties = 0

    @property
    def tested(self) -> Track:
        """The tested model's own best tokens and losses."""
        return self._tested

    def add(self, number: int, start: int, logits: np.ndarray) -> None:
        """Takes a block of the tested model. Raises ValueError when the vocabularies differ in size."""
        self._tested.add(number, start, logits)
        expected = self._reference.logits(number, start, start + len(logits))
        if expected is None:
            return
        if expected.shape[1] != logits.shape[1]:
            raise ValueError(f"the vocabularies have {expected.shape[1]} and {logits.shape[1]} tokens")
        for first, part in _parts(expected):
            a = part.astype(np.float64)
            b = logits[first : first + len(a)].astype(np.float64)
            log_a, log_b = log_softmax(a), log_softmax(b)
            self._klds.append((np.exp(log_a) * (log_a - log_b)).sum(-1))
            self._count(a, b)
            following = self._reference.sequences[number][start + first + 1 : start + first + 1 + len(a)]
            rows = np.arange(len(following))
            self._changes.append(np.exp(log_b[rows, following]) - np.exp(log_a[rows, following]))

    def result(self) -> LogitDistance:
        """The distance over everything that was added; perplexities over all sequences of the track."""
        klds, changes = np.concatenate(self._klds), np.concatenate(self._changes)
        return LogitDistance(
            positions=len(klds),
            mean_kld=float(klds.mean()),
            median_kld=float(np.median(klds)),
            kld_99=float(np.quantile(klds, 0.99)),
            max_kld=float(klds.max()),
            mismatches=self._mismatches,
            ties=self._ties,
            rms_dp=float(np.sqrt(np.square(changes).mean())) if len(changes) else 0.0,
            perplexity=(_perplexity(self._reference), _perplexity(self._tested)),
        )

    def _count(self, a: np.ndarray, b: np.ndarray) -> None:
        rows = np.arange(len(a))
        best, other = a.argmax(-1), b.argmax(-1)
        finite = np.isfinite(b).all(-1)  # not-a-number must count as a mismatch, never as a tie
        differ = (best != other) | ~finite
        tie = differ & finite & (a[rows, best] - a[rows, other] <= self._tie)
        self._ties += int(tie.sum())
        self._mismatches += int((differ & ~tie).sum())


@dataclass(frozen=True)
class WeightError:
    """A tensor's stored type, its relative error ‖w − w'‖ / ‖w‖ (infinite when not finite), and, for a float type,
    how many values are not the source's own rounded to the type."""

    kind: str
    relative: float
    changed: int


def weight_errors(tested: Header, truth: RowsOf) -> dict[str, WeightError]:
    """The errors of all tensors: float types on every row, large quantized ones on evenly spread rows."""
    errors = {}
    for name, tensor in tested.tensors.items():
        kind = tensor.kind.name
        difference = norm = 0.0
        changed = 0
        for start, stop in row_blocks(tensor.shape) if kind in limits.FLOATS else sampled_blocks(tensor.shape):
            expected, found = truth(name, start, stop), tested.rows(name, start, stop)
            if kind in limits.FLOATS:
                changed += _changed(expected, found, kind)
            with np.errstate(invalid="ignore", over="ignore"):  # a damaged value may be anything
                difference += float(np.square(found - expected, dtype=np.float64).sum())
            norm += float(np.square(expected, dtype=np.float64).sum())
        error = math.sqrt(difference / norm) if norm else math.sqrt(difference)
        errors[name] = WeightError(kind, error if math.isfinite(error) else math.inf, changed)
    return errors


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, over the last axis."""
    logits = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _changed(expected: np.ndarray, found: np.ndarray, kind: str) -> int:
    if kind == "F32":
        return int((found.view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32)).sum())
    if kind == "F16":
        rounded = expected.astype(np.float16).astype(np.float32)
    else:
        bits = quantize(np.ascontiguousarray(expected), GGMLQuantizationType.BF16).view(np.uint16)
        rounded = (bits.astype(np.uint32) << 16).view(np.float32)
    return int((found.view(np.uint32) != rounded.view(np.uint32)).sum())


def sampled_blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Row ranges that cover a tensor, or 16 evenly spread parts of a large one."""
    if math.prod(shape) <= _SAMPLE_ELEMENTS:
        return row_blocks(shape)
    rows = max(1, _SAMPLE_ELEMENTS // math.prod(shape[1:]) // 16)
    return [(int(start), int(start) + rows) for start in np.linspace(0, shape[0] - rows, 16)]


def _parts(logits: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(first row, rows) in parts of bounded size."""
    step = max(1, _ELEMENTS // logits.shape[1])
    return [(start, logits[start : start + step]) for start in range(0, len(logits), step)]


def _perplexity(track: Track) -> float:
    losses = np.concatenate(track.loss)
    mean = float(losses.mean()) if len(losses) else 0.0
    return math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf
