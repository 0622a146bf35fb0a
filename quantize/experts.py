"""MUE experts folded into dense weights.

Per layer the live adapter adds ``s · (B_0 A_0 x + Σ_e g_e(x) B_e A_e x)``. A dense weight cannot know the
token, so the gates g_e(x) are replaced by constants: their mean over the calibration tokens (`usage`),
1/N (`uniform`), or 0 (`universal`, the baseline that drops the specific experts). The products B_e A_e
are averaged, never A and B separately.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.architectures import TensorPlan
from quantize.checkpoint import Tensors
from quantize.errors import BadInput
from quantize.run_folder import read_object

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.mue_(?P<part>A|B|route|noise)\.weight")
_PARTS = {"A", "B", "route", "noise"}


@dataclass(frozen=True)
class Experts:
    """The experts of one linear layer: A [(1+N)·r, in] and B [out, (1+N)·r], the universal expert first."""

    a: np.ndarray
    b: np.ndarray
    rank: int
    scaling: float

    @property
    def num_specific(self) -> int:
        return self.a.shape[0] // self.rank - 1

    def delta_rows(self, coefficients: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of ``s · Σ_j c_j B_j A_j``, float32 [rows, in]; coefficients: [1+N]."""
        weights = np.repeat(coefficients, self.rank) * self.scaling
        return (self.b[start:stop] * weights.astype(np.float32)) @ self.a


class Adapter:
    """A saved MUE adapter, by the name of the layer it sits on (`model.layers.0.mlp.gate_proj`)."""

    def __init__(self, folder: Path) -> None:
        config = read_object(folder / "adapter_config.json")
        if config.get("peft_type") != "MUE":
            raise BadInput(f"{folder} holds a {config.get('peft_type')} adapter; only MUE adapters can be exported.")
        try:
            rank, specific = int(config["r"]), int(config["num_specific"])
            scaling = float(config["alpha"]) / rank
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise BadInput(f"{folder / 'adapter_config.json'} lacks r, alpha or num_specific: {error!r}.") from error
        self.layers = _read(folder, rank, specific, scaling)

    def check(self, plans: list[TensorPlan]) -> None:
        """Every layer of the adapter must be a matrix of the model, of the same shape. Raises BadInput."""
        shapes = {plan.source: plan.shape for plan in plans}
        for module, experts in self.layers.items():
            expected = (experts.b.shape[0], experts.a.shape[1])
            if shapes.get(f"{module}.weight") != expected:
                raise BadInput(
                    f"The adapter's layer {module} {expected} does not fit the model (it has "
                    f"{shapes.get(f'{module}.weight')}); the adapter was trained on another base, train the run again."
                )


class Merge:
    """A chosen way of merging: one coefficient per expert and layer."""

    def __init__(self, adapter: Adapter, method: str, usage: Mapping[str, np.ndarray]) -> None:
        """`usage`: mean gates [N] of each layer over the calibration tokens (used by the method `usage`)."""
        self.method = method
        self._layers = adapter.layers
        self.coefficients = {
            module: expert_coefficients(method, experts.num_specific, usage.get(module))
            for module, experts in adapter.layers.items()
        }

    def delta_rows(self, module: str, start: int, stop: int) -> np.ndarray | None:
        """Rows start:stop of what the experts add to a layer's weight; None for a layer without experts."""
        if module not in self._layers:
            return None
        return self._layers[module].delta_rows(self.coefficients[module], start, stop)


def expert_coefficients(method: str, num_specific: int, usage: np.ndarray | None) -> np.ndarray:
    """The constants [1+N] that stand for the gates; the universal expert's is always 1."""
    if method == "universal":
        specific = np.zeros(num_specific)
    elif method == "uniform":
        specific = np.full(num_specific, 1.0 / num_specific)
    elif method == "usage" and usage is not None:
        specific = np.asarray(usage, dtype=np.float64)
    else:
        raise ValueError(f"merge method {method!r} is unknown or lacks its gates")
    return np.concatenate([[1.0], specific])


def _read(folder: Path, rank: int, specific: int, scaling: float) -> dict[str, Experts]:
    tensors = Tensors([folder / "adapter_model.safetensors"])
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise BadInput(f"{folder}: the tensor {key} is no part of a MUE adapter; train the run again.")
        found.setdefault(match["module"], {})[match["part"]] = key
    if not found:
        raise BadInput(f"{folder} holds no experts; train the run's stage mue again.")
    layers = {}
    for module, keys in sorted(found.items()):
        if set(keys) != _PARTS:
            raise BadInput(f"{folder}: {module} lacks mue_{min(_PARTS - set(keys))}; train the run's stage mue again.")
        a, b = tensors.array(keys["A"]), tensors.array(keys["B"])
        total = (1 + specific) * rank
        routers = (tensors.shape(keys["route"]), tensors.shape(keys["noise"]))
        if a.shape[0] != total or b.shape[1] != total or routers != ((specific, a.shape[1]),) * 2:
            raise BadInput(f"{folder}: {module} does not have {1 + specific} experts of rank {rank}; train it again.")
        layers[module] = Experts(a, b, rank, scaling)
    return layers
