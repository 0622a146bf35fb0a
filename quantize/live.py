"""The live MUE model: its experts at work, and any merge of them in their place."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.errors import BadInput
from quantize.hugging_face import HuggingFace, Tokenised
from quantize.merging.factors import Merge

_NAME = "default"
_ROOM = 1.5  # GPU memory over the model's own size, for activations and second moments
_PREFIX = "base_model.model."

# A [k, in] and B [out, k] of each layer, on the model's device.
Tensors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class Live(HuggingFace):
    """Base model with its MUE adapter; `merged` puts a merge in the experts' place, `fold` does so for good."""

    def __init__(self, checkpoint: Path, adapter: Path) -> None:
        super().__init__(checkpoint, adapter)
        self.layers: dict[str, Any] = {
            name.removeprefix(_PREFIX): module
            for name, module in self.model.named_modules()
            if hasattr(module, "mue_A")
        }

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def on_fastest_device(self) -> Iterator[None]:
        """On the GPU, when there is one with room for the model, for the duration of a `with`."""
        size = sum(parameter.nbytes for parameter in self.model.parameters())
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > _ROOM * size:
            self.model.to("cuda")
        try:
            yield
        finally:
            self.model.to("cpu")

    def decoder_layers(self) -> list[tuple[Any, dict[str, Any]]]:
        """The decoder layers in order, each with the adapted layers inside. Raises BadInput for adapters elsewhere."""
        found = [re.match(r"(.+?\.)(\d+)\.", name) for name in self.layers]
        stems = {match[1] if match else "" for match in found}
        if len(stems) != 1 or "" in stems:
            raise BadInput("The experts do not all sit in decoder layers; merge them with --merge usage.")
        stem = stems.pop()
        blocks = self.model.get_submodule(f"{_PREFIX}{stem}".removesuffix("."))
        return [
            (block, {name: layer for name, layer in self.layers.items() if name.startswith(f"{stem}{number}.")})
            for number, block in enumerate(blocks)
        ]

    @contextlib.contextmanager
    def merged(self, factors: Tensors) -> Iterator[None]:
        """The base model plus ``B A`` of each layer in `factors` (which may grow meanwhile), without experts."""

        def adder(name: str) -> Any:
            def hook(_layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
                if name not in factors:
                    return None
                a, b = factors[name]
                return output + (inputs[0] @ a.T) @ b.T

            return hook

        handles = [layer.get_base_layer().register_forward_hook(adder(name)) for name, layer in self.layers.items()]
        try:
            with self.without_adapter():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def tensors(self, merge: Merge) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A merge's matrices where the model is."""
        pairs = {name: merge.factors(name) for name in merge}
        return {
            n: (torch.from_numpy(a).to(self.device), torch.from_numpy(b).to(self.device)) for n, (a, b) in pairs.items()
        }

    def ids(self, dialogue: Tokenised) -> torch.Tensor:
        """Token ids [1, tokens]."""
        return torch.tensor([dialogue.ids], device=self.device)

    def answers(self, dialogue: Tokenised) -> torch.Tensor:
        """Which positions predict a token that the assistant wrote, bool [tokens]; the last predicts nothing."""
        return torch.tensor([*dialogue.assistant[1:], False], device=self.device)


def gates(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The gate of each rank row, 1 for the universal expert's: [tokens, in] → [tokens, (1+N)·r]."""
    specific = torch.nn.functional.pad(layer.gates(x, _NAME), (1, 0), value=1.0)
    return specific.repeat_interleave(layer.r[_NAME], dim=-1)


def experts(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A [k, in] and B [out, k] of a live layer, the scaling folded into B."""
    return layer.mue_A[_NAME].weight, layer.mue_B[_NAME].weight * layer.scaling[_NAME]
