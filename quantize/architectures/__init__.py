"""Which architectures can be exported, and what each must say about its tensors and hyper-parameters."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from quantize.errors import BadInput

# What GGUF metadata may hold here; Python's type decides the GGUF type (int: u32, float: f32).
Value = bool | int | float | str | list[str] | list[int] | list[float]

_MODULES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",  # the same tensors and graph, unless it slides a window
    "BaiChuanForCausalLM": "baichuan",  # Baichuan 7B
    "BaichuanForCausalLM": "baichuan",  # Baichuan 13B, both Baichuan2
}


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One tensor of the GGUF and where its rows come from."""

    name: str  # in the GGUF
    source: str  # in the checkpoint; "" for a computed tensor
    shape: tuple[int, ...]  # of the GGUF tensor, numpy order
    order: np.ndarray | None = None  # the source row of each row (permuted q and k, a slice of W_pack); None: the same
    unit_rows: bool = False  # Baichuan2's NormHead: every row is divided by its length, after merging
    values: np.ndarray | None = None  # float32, of a computed tensor

    @property
    def is_matrix(self) -> bool:
        """Matrices take the file's type; norms, biases and factors stay float32."""
        return len(self.shape) == 2

    def source_rows(self, start: int, stop: int) -> slice | np.ndarray:
        """Which rows of the source make the rows start:stop; a slice wherever they lie together."""
        if self.order is None:
            return slice(start, stop)
        rows = self.order[start:stop]
        together = len(rows) > 0 and bool((np.diff(rows) == 1).all())
        return slice(int(rows[0]), int(rows[-1]) + 1) if together else rows


def source_shapes(plans: Sequence[TensorPlan]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the plans read; W_pack has the rows of the three that are cut from it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for plan in plans:
        if plan.values is None:
            rows = shapes.get(plan.source, (0,))[0]
            shapes[plan.source] = (rows + plan.shape[0], *plan.shape[1:])
    return shapes


class Architecture(Protocol):
    """The interface of a module in this package."""

    NAME: str

    def metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """Hyper-parameters under their GGUF keys. Raises BadInput for what llama.cpp would not compute."""
        ...

    def plan(self, config: dict[str, Any]) -> list[TensorPlan]:
        """Every tensor of the file, in file order. Raises BadInput for sizes that make no model."""
        ...


def for_config(config: dict[str, Any]) -> Architecture:
    """The architecture of a `config.json`. Raises BadInput naming the supported ones."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else None
    module = _MODULES.get(str(name))
    if module is None:
        raise BadInput(f"The architecture {name} cannot be exported; supported: {', '.join(_MODULES)}.")
    if config.get("quantization_config"):
        raise BadInput(
            "config.json has a `quantization_config`: the checkpoint is quantized already, and doing it twice costs "
            "quality twice; export the checkpoint in bfloat16 or float16 that it was made from."
        )
    return cast(Architecture, importlib.import_module(f"quantize.architectures.{module}"))
