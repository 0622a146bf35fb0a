"""The MUE linear layer, computed in rank space.

The published code builds one [tokens, experts, out] tensor; the same sum is one LoRA of rank
(1+N)·r whose hidden activations are scaled by the gates, because a gate is a scalar per token:
``Σ_e g_e (x A_eᵀ) B_eᵀ = [(x A_catᵀ) ⊙ (g ⊗ 1_r)] B_catᵀ``. Only the rank-sized activations are saved
for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from trainer.mue.config import MueConfig


class MueLinear(nn.Module, BaseTunerLayer):
    """A linear layer with one universal and N routed low-rank experts.

    Per adapter: ``mue_A`` [(1+N)·r, in] and ``mue_B`` [out, (1+N)·r] hold the experts one after the
    other (the universal one first), ``mue_route`` and ``mue_noise`` [N, in] the router.
    """

    adapter_layer_names = ("mue_A", "mue_B", "mue_route", "mue_noise")
    other_param_names = ("r", "scaling", "num_specific")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MueConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.num_specific: dict[str, int] = {}
        self.mue_A = nn.ModuleDict()
        self.mue_B = nn.ModuleDict()
        self.mue_route = nn.ModuleDict()
        self.mue_noise = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MueConfig) -> None:
        """Adds (or replaces) the experts and the router of one adapter."""
        rank = (1 + config.num_specific) * config.r
        self.r[adapter_name] = config.r
        self.scaling[adapter_name] = config.alpha / config.r
        self.num_specific[adapter_name] = config.num_specific
        down = nn.Linear(self.in_features, rank, bias=False)
        up = nn.Linear(rank, self.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.mue_A[adapter_name] = down
        self.mue_B[adapter_name] = up
        self.mue_route[adapter_name] = nn.Linear(self.in_features, config.num_specific, bias=False)
        self.mue_noise[adapter_name] = nn.Linear(self.in_features, config.num_specific, bias=False)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def gates(self, x: torch.Tensor, adapter_name: str = "default") -> torch.Tensor:
        """The specific experts' gates, float32 [..., N], summing to 1.

        The noise of the paper's router is drawn only while training (the released code draws it at
        inference too, which makes its answers irreproducible), and the softmax is in float32 (there: float16).
        """
        x = x.to(_dtype(self.mue_route[adapter_name]))
        logits = self.mue_route[adapter_name](x).float()
        if self.training:
            spread = functional.softplus(self.mue_noise[adapter_name](x).float())
            logits = logits + torch.randn_like(logits) * spread
        return torch.softmax(logits, dim=-1)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``base(x) + Σ_adapters s · B((1, gates) ⊙ A x)``; x: [..., in] → [..., out]."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.mue_A:
                continue
            gates = self.gates(x, name)
            weights = torch.cat([torch.ones_like(gates[..., :1]), gates], dim=-1) * self.scaling[name]
            hidden = self.mue_A[name](x.to(_dtype(self.mue_A[name])))
            hidden = hidden.unflatten(-1, (1 + self.num_specific[name], self.r[name]))
            hidden = (hidden * weights.to(hidden.dtype).unsqueeze(-1)).flatten(-2)
            result = result + self.mue_B[name](hidden).to(result.dtype)
        return result


def _dtype(linear: nn.Module) -> torch.dtype:
    """Dtype of a router's or expert's weight: the input is cast to it, as PEFT's LoRA does."""
    return next(linear.parameters()).dtype
