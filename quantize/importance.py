"""The importance matrix: how strongly each input column of each linear layer is used on real text.

A column's weight is the mean over tokens of x², what llama.cpp's `llama-imatrix` collects. Its quantizer then keeps
small the error that matters, Σ_j E[x_j²]·(w_j - ŵ_j)², instead of the plain squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize.architectures import TensorPlan
from quantize.errors import BadInput

if TYPE_CHECKING:
    import torch

_WRAPPED = ".base_layer"  # where PEFT keeps the layer that an adapter sits on
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Importance:
    """What was collected. `means`: module name in the checkpoint → mean x² per input column, float64 [in]."""

    means: Mapping[str, np.ndarray]
    tokens: int
    sequences: int
    unseen: list[str] = field(default_factory=list)  # modules that no token went through

    def record(self, dataset: str) -> dict[str, str | int]:
        """What the quantized file says about it, under llama.cpp's own keys."""
        return {
            "quantize.imatrix.dataset": dataset,
            "quantize.imatrix.entries_count": len(self.means),
            "quantize.imatrix.chunks_count": self.sequences,
        }


def collect(
    model: torch.nn.Module, sequences: Iterable[Sequence[int]], progress: Callable[[int], None] = lambda _done: None
) -> Importance:
    """Runs token sequences through `model` and watches every nn.Linear, also one that a PEFT adapter wraps.

    The model runs as it is: fold the adapter in first, or leave it on. Logits are computed for one token only, so a
    long sequence with a large vocabulary needs no more memory than its activations. `progress` gets the number of
    sequences done. Raises BadInput when an input is not finite or no token was seen.
    """
    import torch

    layers = _linear_layers(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    sums = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in layers.items()}
    rows = dict.fromkeys(layers, 0)
    # Queries, keys and values read one tensor: its squares are added up once.
    last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def watch(name: str, inputs: torch.Tensor) -> None:
        nonlocal last
        if last is None or last[0] is not inputs or last[1] != inputs._version:
            flat = inputs.reshape(-1, inputs.shape[-1])
            last = inputs, inputs._version, flat.double().square().sum(0).cpu()
        sums[name] += last[2]
        rows[name] += inputs.numel() // inputs.shape[-1]

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...] | None]:
        def before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            watch(name, inputs[0])
            return (inputs[0][:, -1:], *inputs[1:]) if module is head else None

        return before

    device = next(model.parameters()).device
    tokens = done = 0
    training = model.training
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            for ids in sequences:
                model(input_ids=torch.tensor([list(ids)], device=device))
                last = None
                tokens += len(ids)
                done += 1
                progress(done)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    means = {name: (total / rows[name]).numpy() for name, total in sums.items() if rows[name]}
    if not means:
        raise BadInput("No token went through the model, so there is no importance matrix; give calibration dialogues.")
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise BadInput(f"The inputs of {name} are not finite on the calibration text; the model has diverged.")
    return Importance(means, tokens, done, sorted(name for name, count in rows.items() if not count))


def for_tensors(importance: Importance, plans: Sequence[TensorPlan]) -> dict[str, np.ndarray]:
    """The matrix by GGUF tensor, float32 [columns]; W_pack's serves the three cut from it, row orders change nothing.

    Tensors without an entry (embedding, norms, unseen layers) are left out. Raises BadInput when columns do not fit.
    """
    found = {}
    for plan in plans:
        mean = importance.means.get(plan.source.removesuffix(".weight"))
        if mean is None or not plan.is_matrix:
            continue
        if mean.shape != plan.shape[1:]:
            raise BadInput(f"The importance of {plan.source} has {mean.size} columns, the tensor {plan.shape[1]}.")
        found[plan.name] = mean.astype(np.float32)
    return found


def _linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The checkpoint's linear layers by their name in it; an adapter's own small layers do not reach the file."""
    import torch

    wrapped = [f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer")]
    return {
        name.removeprefix(_PREFIX).removesuffix(_WRAPPED): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (name.endswith(_WRAPPED) or not any(name.startswith(layer) for layer in wrapped))
    }
