"""The closed form and the rank reduction against independent solvers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from quantize.merging.least_squares import Moments, reduce_rank, solve

RANK, SPECIFIC, IN, OUT, TOKENS = 2, 3, 12, 20, 400


@dataclass
class Layer:
    """A layer of experts and its inputs, float64; y is what the live experts add."""

    x: np.ndarray
    weight: np.ndarray
    a: np.ndarray
    b: np.ndarray
    gates: np.ndarray

    @property
    def y(self) -> np.ndarray:
        """Expert by expert, from the definition."""
        total = self.x @ self.a[:RANK].T @ self.b[:, :RANK].T
        for expert in range(1, SPECIFIC + 1):
            part = slice(expert * RANK, (expert + 1) * RANK)
            total += self.gates[:, expert - 1 : expert] * (self.x @ self.a[part].T @ self.b[:, part].T)
        return total

    def moments(self) -> Moments:
        rows = np.repeat(np.concatenate([np.ones((TOKENS, 1)), self.gates], axis=1), RANK, axis=1)
        weighted = self.x * self.weight[:, None]
        moments = Moments(torch.zeros(IN, IN, dtype=torch.float64))
        for part in (slice(0, 150), slice(150, TOKENS)):
            moments.add_input(torch.from_numpy(self.x[part].T @ weighted[part]), float(self.weight[part].sum()))
            hidden = ((self.x[part] @ self.a.T) * rows[part]).T @ weighted[part]
            moments.add_layer("one", torch.from_numpy(hidden), torch.from_numpy(self.weight[part] @ rows[part]))
        return moments

    def error(self, weight: np.ndarray) -> float:
        return float((self.weight[:, None] * (self.y - self.x @ weight.T) ** 2).sum())


@pytest.fixture
def layer() -> Layer:
    """Inputs of unequal variance and with a mean, tokens of unequal weight, gates that depend on the input."""
    random = np.random.default_rng(0)
    x = random.normal(size=(TOKENS, IN)) * np.linspace(0.3, 2, IN) + random.normal(size=IN)
    logits = x @ random.normal(size=(IN, SPECIFIC)) * 0.6
    gates = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    total = (1 + SPECIFIC) * RANK
    weight = random.choice([0.1, 1.0], TOKENS)
    return Layer(x, weight, random.normal(size=(total, IN)), random.normal(size=(OUT, total)), gates)


def solved(layer: Layer, damping: float) -> np.ndarray:
    moments = layer.moments()
    mean = moments.gates["one"] / moments.weight
    prior = torch.from_numpy(layer.a) * mean.unsqueeze(1)
    return solve(moments.hidden["one"], moments.gram, prior, damping).numpy()


def usage(layer: Layer) -> np.ndarray:
    mean = np.repeat(np.concatenate([[1.0], layer.weight @ layer.gates / layer.weight.sum()]), RANK)
    return layer.a * mean[:, None]


@pytest.mark.parametrize("damping", [1e-9, 1e-3, 0.3])
def test_closed_form_equals_lstsq_on_stacked_data(layer: Layer, damping: float) -> None:
    """The ridge as so many more rows of data: √λ I must map to √λ times the prior."""
    root = np.sqrt(layer.weight)[:, None]
    ridge = np.sqrt(damping * (layer.weight[:, None] * layer.x**2).sum() / IN)
    inputs = np.concatenate([root * layer.x, ridge * np.eye(IN)])
    outputs = np.concatenate([root * layer.y, ridge * (layer.b @ usage(layer)).T])
    expected = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    np.testing.assert_allclose(layer.b @ solved(layer, damping), expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_strong_damping_is_usage_and_the_universal_expert_stays(layer: Layer) -> None:
    np.testing.assert_allclose(solved(layer, 1e12), usage(layer), atol=1e-9)
    np.testing.assert_allclose(solved(layer, 1e-3)[:RANK], layer.a[:RANK], atol=1e-9)


def test_least_squares_beats_constant_gates(layer: Layer) -> None:
    best = layer.error(layer.b @ solved(layer, 1e-6))
    assert best < 0.8 * layer.error(layer.b @ usage(layer))
    nudged = layer.b @ solved(layer, 1e-6) + 1e-3 * np.random.default_rng(1).normal(size=(OUT, IN))
    assert best < layer.error(nudged)


def test_dead_inputs_give_the_prior_and_broken_sums_are_refused() -> None:
    zeros, prior = torch.zeros(IN, IN, dtype=torch.float64), torch.ones(3, IN, dtype=torch.float64)
    torch.testing.assert_close(solve(zeros[:3], zeros, prior, 1e-3), prior)
    with pytest.raises(ValueError, match="positive definite"):
        solve(zeros[:3], torch.full_like(zeros, torch.nan), prior, 1e-3)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_reduced_rank_is_the_weighted_optimum(layer: Layer, rank: int) -> None:
    """Eckart and Young: nothing of that rank is nearer than the discarded singular values; plain SVD is farther."""
    a = solved(layer, 1e-3)
    gram = layer.moments().gram
    small, wide = reduce_rank(torch.from_numpy(a), torch.from_numpy(layer.b), gram, rank)
    assert small.shape == (rank, IN)
    assert wide.shape == (OUT, rank)

    def distance(weight: np.ndarray) -> float:
        return float((layer.weight[:, None] * (layer.x @ (weight - layer.b @ a).T) ** 2).sum())

    root = np.sqrt(layer.weight)[:, None] * layer.x
    optimum = (np.linalg.svd(layer.b @ a @ root.T, compute_uv=False)[rank:] ** 2).sum()
    assert distance((wide @ small).numpy()) == pytest.approx(optimum, rel=1e-9)
    u, s, v = np.linalg.svd(layer.b @ a)
    assert distance((u[:, :rank] * s[:rank]) @ v[:rank]) > 1.05 * optimum


def test_a_rank_that_changes_nothing_is_left_alone(layer: Layer) -> None:
    a, b = torch.from_numpy(layer.a), torch.from_numpy(layer.b)
    assert reduce_rank(a, b, layer.moments().gram, len(layer.a)) == (a, b)
