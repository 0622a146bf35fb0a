"""Configuration of the mixture of universal-specific experts (MUE)."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftConfig

MUE_TYPE = "MUE"
_FFN = ("gate_proj", "up_proj", "down_proj")


class MueError(ValueError):
    """Experts that cannot be made, placed or imported; the message names the cause and the remedy."""


@dataclass
class MueConfig(PeftConfig):
    """One universal expert and `num_specific` routed experts on every target module.

    The paper's section 3.4: ``z = s · (E_u(x) + Σ_j G_j(x) E_j(x))`` with
    ``G(x) = softmax(x W_g + softplus(x W_noise) · ε)`` and rank-`r` experts ``E(x) = B A x``.

    Parameters:
        r: rank of each expert.
        alpha: scale; the output of all experts is multiplied by ``alpha / r``.
        num_specific: number N of routed experts beside the universal one.
        target_modules: suffixes of the linear modules that get experts (or a regular expression over whole
            names, or "all-linear"); None means the FFN projections, where the paper's figure 2 draws them.

    Raises MueError for a rank or a number of experts below 1.
    """

    r: int = 8
    alpha: float = 16.0
    num_specific: int = 3
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT's enum of methods is closed; a plain string hashes like a member (see mue/__init__.py).
        self.peft_type = MUE_TYPE  # type: ignore[assignment]
        if self.r < 1 or self.num_specific < 1:
            raise MueError(f"MUE needs r ≥ 1 and num_specific ≥ 1, got r={self.r}, num_specific={self.num_specific}.")
        if self.target_modules is None:
            self.target_modules = list(_FFN)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
