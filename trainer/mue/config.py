"""Configuration of the mixture of universal-specific experts (MUE)."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

MUE_TYPE = "MUE"


@dataclass
class MueConfig(PeftConfig):
    """One universal expert and `num_specific` routed experts on every target module.

    The paper's section 3.4: ``z = s · (E_u(x) + Σ_j G_j(x) E_j(x))`` with
    ``G(x) = softmax(x W_g + softplus(x W_noise) · ε)`` and rank-`r` experts ``E(x) = B A x``.

    Parameters:
        r: rank of each expert.
        alpha: scale; the output of all experts is multiplied by ``alpha / r``.
        num_specific: number N of routed experts beside the universal one.
        target_modules: suffixes of the linear modules that get experts; by default the FFN
            projections, where the paper's figure 2 draws them.
    """

    r: int = 8
    alpha: float = 16.0
    num_specific: int = 3
    target_modules: list[str] | str | None = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
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
            raise ValueError(f"MUE needs r ≥ 1 and num_specific ≥ 1, got r={self.r}, num_specific={self.num_specific}.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
