"""The MUE linear layer, computed in rank space.

The published code builds one [tokens, experts, out] tensor; the same sum is one LoRA of rank
(1+N)·r whose hidden activations are scaled by the gates, because a gate is a scalar per token:
``Σ_e g_e (x A_eᵀ) B_eᵀ = [(x A_catᵀ) ⊙ (g ⊗ 1_r)] B_catᵀ``. Only rank-sized activations are saved
for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainer.mue.config import MueConfig

# TRL's name for the frozen copy of an adapter that preference training starts from.
_REFERENCE = "ref"


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
        """The specific experts' gates without noise, at least float32; x: [..., in] → [..., N], summing to 1."""
        return _softmax(functional.linear(x, _weight(self.mue_route, adapter_name).to(x.dtype)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``base(x) + Σ_adapters s · B((1, gates) ⊙ A x)``; x: [..., in] → [..., out].

        The noise of the paper's router is drawn only while the adapter is trained (the released code draws it at
        inference too, which makes its answers irreproducible), and never in a reference: the same input always
        has the same reference. The softmax is in float32 (released: float16).
        """
        adapters = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.mue_A]
        if not adapters:
            return self.base_layer(x)
        # Two dimensions, so that one addmm both projects and adds: no [tokens, out] tensor besides the result.
        # Not in place: selective checkpointing refuses a cached product that was changed afterwards.
        flat = x.reshape(-1, self.in_features)
        result = self.base_layer(x).reshape(-1, self.out_features)
        for name in adapters:
            hidden = self._hidden(flat, name)
            up = _weight(self.mue_B, name).to(hidden.dtype).T
            if result.dtype == hidden.dtype:
                result = torch.addmm(result, hidden, up, alpha=self.scaling[name])
            else:  # under autocast a 4-bit layer answers in its input's dtype
                result = torch.add(result, (hidden @ up).to(result.dtype), alpha=self.scaling[name])
        return result.view(*x.shape[:-1], self.out_features)

    def _hidden(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The experts' hidden activations times their gates; x: [tokens, in] → [tokens, (1+N)·r]."""
        weights = [_weight(self.mue_A, name), _weight(self.mue_route, name)]
        noise = _weight(self.mue_noise, name)
        if self.training and noise.requires_grad and name != _REFERENCE:
            weights.append(noise)
        projected: torch.Tensor = _Project.apply(x, *weights)  # type: ignore[assignment]
        hidden, logits, *spread = projected.split([len(weight) for weight in weights], dim=-1)
        # The universal expert's gate is 1.
        gates = functional.pad(_softmax(logits, *spread), (1, 0), value=1.0).to(hidden.dtype)
        return (hidden.unflatten(-1, (-1, self.r[name])) * gates.unsqueeze(-1)).flatten(-2)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always raises: gates differ from token to token, so there is no weight to add the experts to."""
        raise NotImplementedError(
            "MUE cannot be merged exactly, because its gates depend on the input. "
            "Use `pediatricsgpt quantize`, which fits the nearest weights by least squares and measures the loss."
        )


class _Project(torch.autograd.Function):
    """``x · cat(weights)ᵀ`` as one product; x: [tokens, in], weights: [rows, in] → [tokens, Σ rows].

    The small weights are cast to the activations' dtype and not the other way round. Plain autograd would
    keep their joined copy until the backward pass, in every layer; here it is joined again instead.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        return functional.linear(x, torch.cat(weights).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_x = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ torch.cat(weights).to(grad.dtype)).to(x.dtype)
        if not any(ctx.needs_input_grad[1:]):
            return grad_x, *[None] * len(weights)
        grad_weights = (grad.T @ x.to(grad.dtype)).to(weights[0].dtype)
        return grad_x, *grad_weights.split([len(weight) for weight in weights])


def _softmax(logits: torch.Tensor, spread: torch.Tensor | None = None) -> torch.Tensor:
    """Gates [..., N] from the router's logits and, while training, its raw noise scale; at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if spread is not None:
        scale = functional.softplus(spread.to(dtype))
        logits = torch.addcmul(logits.to(dtype), torch.randn_like(scale), scale)
    return torch.softmax(logits, dim=-1, dtype=dtype)


def _weight(layers: nn.ModuleDict, name: str) -> torch.Tensor:
    return layers[name].weight  # type: ignore[return-value]
