"""Which architectures can be exported, and what each must say about its tensors and hyper-parameters."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, cast

from quantize.errors import BadInput

# What GGUF metadata may hold here; Python's type decides the GGUF type (int: u32, float: f32).
Value = bool | int | float | str | list[str] | list[int]

_MODULES = {"Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the GGUF: its name there, its name in the checkpoint, and its shape in numpy order."""

    name: str
    source: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Matrices take the file's type; norms stay float32."""
        return len(self.shape) == 2


class Architecture(Protocol):
    """The interface of a module in this package."""

    NAME: str

    def metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """Hyper-parameters under their GGUF keys. Raises BadInput for what llama.cpp would not compute."""
        ...

    def plan(self, config: dict[str, Any]) -> list[TensorPlan]:
        """Every tensor of the file, in file order."""
        ...


def for_config(config: dict[str, Any]) -> Architecture:
    """The architecture of a `config.json`. Raises BadInput naming the supported ones."""
    name = str((config.get("architectures") or [None])[0])
    module = _MODULES.get(name)
    if module is None:
        raise BadInput(f"The architecture {name} cannot be exported yet; supported: {', '.join(_MODULES)}.")
    return cast(Architecture, importlib.import_module(f"quantize.architectures.{module}"))


def required(config: dict[str, Any], key: str) -> Any:
    """A positive number of the configuration. Raises BadInput when it is missing or something else."""
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise BadInput(f"config.json: `{key}` must be a positive number, found {value!r}; save the checkpoint again.")
    return value
