"""The experts of a saved MUE adapter."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize.architectures import TensorPlan, source_shapes
from quantize.checkpoint import Tensors
from quantize.errors import BadInput
from quantize.run_folder import read_object

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.mue_(?P<part>A|B|route|noise)\.weight")
_PARTS = {"A", "B", "route", "noise"}


@dataclass(frozen=True)
class Experts:
    """The experts of one linear layer: A [(1+N)·r, in] and B [out, (1+N)·r], the universal expert first.

    The live layer adds ``B ((1, g(x)) ⊗ 1_r ⊙ A x)``: the adapter's scaling is folded into B.
    """

    a: np.ndarray
    b: np.ndarray
    rank: int

    @property
    def num_specific(self) -> int:
        return self.a.shape[0] // self.rank - 1


class Adapter:
    """A saved MUE adapter, by the name of the layer it sits on (`model.layers.0.mlp.gate_proj`)."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput when the folder is damaged, incomplete, of another kind, or not finite."""
        config = read_object(folder / "adapter_config.json")
        if config.get("peft_type") != "MUE":
            raise BadInput(f"{folder} holds a {config.get('peft_type')} adapter; only MUE adapters can be exported.")
        try:
            rank, specific = int(config["r"]), int(config["num_specific"])
            scaling = float(config["alpha"]) / rank
            if not math.isfinite(scaling):
                raise ValueError(f"alpha is {config['alpha']}")
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise BadInput(
                f"{folder / 'adapter_config.json'} lacks a usable r, alpha or num_specific ({error!r}); copy it from "
                "the training run."
            ) from error
        self.layers = _read(folder, rank, specific, scaling)

    def check(self, plans: list[TensorPlan]) -> None:
        """Every layer of the adapter must be a matrix of the model, of the same shape. Raises BadInput."""
        shapes = source_shapes(plans)
        for module, experts in self.layers.items():
            expected = (experts.b.shape[0], experts.a.shape[1])
            if shapes.get(f"{module}.weight") != expected:
                raise BadInput(
                    f"The adapter's layer {module} {expected} does not fit the model (it has "
                    f"{shapes.get(f'{module}.weight')}); the adapter was trained on another base, train the run again."
                )


def _read(folder: Path, rank: int, specific: int, scaling: float) -> dict[str, Experts]:
    tensors = Tensors([folder / "adapter_model.safetensors"])
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise BadInput(f"{folder}: the tensor {key} is no part of a MUE adapter; train the run again.")
        found.setdefault(match["module"], {})[match["part"]] = key
        if not np.isfinite(tensors.array(key)).all():
            raise BadInput(
                f"{folder}: {key} holds values that are not finite; the training diverged, train the run again."
            )
    if not found:
        raise BadInput(f"{folder} holds no experts; train the run's stage mue again.")
    layers = {}
    for module, keys in sorted(found.items()):
        if set(keys) != _PARTS:
            raise BadInput(f"{folder}: {module} lacks mue_{min(_PARTS - set(keys))}; train the run's stage mue again.")
        a, b = tensors.array(keys["A"]), tensors.array(keys["B"])
        total = (1 + specific) * rank
        routers = (tensors.shape(keys["route"]), tensors.shape(keys["noise"]))
        if a.ndim != 2 or b.ndim != 2:
            raise BadInput(f"{folder}: {module} has A {a.shape} and B {b.shape}, which are no matrices; copy it again.")
        if a.shape[0] != total or b.shape[1] != total or routers != ((specific, a.shape[1]),) * 2:
            raise BadInput(f"{folder}: {module} does not have {1 + specific} experts of rank {rank}; train it again.")
        layers[module] = Experts(a, b * np.float32(scaling), rank)
    return layers
