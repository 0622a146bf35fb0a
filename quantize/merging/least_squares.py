"""The dense weight nearest to the experts: ridge least squares in closed form.

The live layer adds ``B h(x)`` with ``h = g(x) ⊙ A x`` (the gate of each rank row, 1 for the universal expert). Of all
``W``, the one that minimises ``Σ w ‖B h(x) − W x‖²`` over the calibration tokens is ``B A'``, so only A' [k, in] is
sought, and only two sums are needed, however many tokens there are. As RegMean (arXiv 2212.09849), with the gates as
soft assignments; the ridge pulls towards a prior instead of towards zero.
"""

from __future__ import annotations

import torch


class Moments:
    """Weighted sums over calibration tokens, float64.

    gram: Σ w x xᵀ [in, in], one for all layers that share the input; by layer hidden: Σ w h xᵀ [k, in] and gates: Σ w g
    [k]; weight: Σ w.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        self.gram = gram
        self.hidden: dict[str, torch.Tensor] = {}
        self.gates: dict[str, torch.Tensor] = {}
        self.weight = 0.0

    def add_input(self, gram: torch.Tensor, weight: float) -> None:
        """One dialogue's part."""
        self.gram += gram
        self.weight += weight

    def add_layer(self, name: str, hidden: torch.Tensor, gates: torch.Tensor) -> None:
        """One dialogue's part of one layer."""
        if name not in self.hidden:
            self.hidden[name] = torch.zeros_like(hidden, dtype=torch.float64)
            self.gates[name] = torch.zeros_like(gates, dtype=torch.float64)
        self.hidden[name] += hidden
        self.gates[name] += gates


def solve(hidden: torch.Tensor, gram: torch.Tensor, prior: torch.Tensor, damping: float) -> torch.Tensor:
    """A' [k, in] that minimises ``Σ w ‖h − A' x‖² + λ ‖A' − prior‖²``, with λ = damping · tr(gram) / in.

    ``A' = (hidden + λ prior) (gram + λ I)⁻¹``; damping → ∞ gives the prior. Float64 in and out.
    Raises ValueError when the sums are not finite.
    """
    # The floor is for a layer whose inputs are all zero: any A' fits, the prior is taken.
    ridge = (damping * gram.diagonal().mean()).clamp(min=1e-30)
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        raise ValueError("the inputs' second moments are not positive definite")
    return torch.cholesky_solve((hidden + ridge * prior).T, factor).T


def reduce_rank(a: torch.Tensor, b: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of that rank nearest to ``B A`` on the calibration tokens: minimal ``Σ w ‖(B A − B₂ A₂) x‖²``.

    That is the truncated SVD of ``B A gram^½``, mapped back. With B = Q R its left singular vectors are Q times the
    eigenvectors of the small matrix ``R A gram Aᵀ Rᵀ``, so neither a root nor an inverse of gram is needed.
    a: [k, in], b: [out, k] → [rank, in], [out, rank].
    """
    if rank >= a.shape[0]:
        return a, b
    q, r = torch.linalg.qr(b)
    inner = r @ a
    _, vectors = torch.linalg.eigh(inner @ gram @ inner.T)
    kept = vectors[:, -rank:]  # eigh sorts in rising order
    return kept.T @ inner, q @ kept
