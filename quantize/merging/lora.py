"""An ordinary PEFT LoRA as something to fold into dense weights; unlike MUE this is exact."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from quantize.architectures import TensorPlan
from quantize.checkpoint import Tensors
from quantize.errors import BadInput
from quantize.run_folder import read_object

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
# What changes the weights in a way that scale · B · A does not express.
_FOREIGN = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "trainable_token_indices", "lora_bias", "use_qalora",
    "alora_invocation_tokens", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# These take their start out of the base's own weights: the adapter belongs to what is left of them.
_SPLIT_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


class LoraMerge:
    """``W + s · B A`` per layer; A [r, in], B [out, r] with the scale folded in."""

    method = "lora"

    def __init__(self, folder: Path) -> None:
        """Raises BadInput when the folder is damaged or uses what cannot be folded."""
        settings = read_object(folder / "adapter_config.json")
        foreign = [key for key in _FOREIGN if settings.get(key)]
        if settings.get("bias", "none") != "none":
            foreign.append("bias")
        start = settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_SPLIT_BASE):
            foreign.append(f"init_lora_weights={start}")
        if foreign:
            raise BadInput(
                f"{folder} uses {', '.join(foreign)}; only plain LoRA is folded in here. Merge it with PEFT's "
                "merge_and_unload() and export the saved checkpoint."
            )
        self._factors = _read(folder, settings)

    def check(self, plans: list[TensorPlan], checkpoint: Tensors) -> None:
        """Every layer of the adapter must be a matrix of the model, of the same shape. Raises BadInput."""
        sources = {plan.source for plan in plans}
        for module, (a, b) in self._factors.items():
            name = f"{module}.weight"
            shape = checkpoint.shape(name) if name in sources else None
            if shape != (b.shape[0], a.shape[1]):
                raise BadInput(
                    f"The adapter's layer {module} {(b.shape[0], a.shape[1])} does not fit the model (it has {shape}); "
                    "the adapter was trained on another base, give that one."
                )

    def delta_rows(self, module: str, rows: slice | np.ndarray) -> np.ndarray | None:
        """What the adapter adds to these rows of a layer's weight, float32; None for a layer without adapter."""
        if module not in self._factors:
            return None
        a, b = self._factors[module]
        return b[rows] @ a


def _read(folder: Path, settings: dict) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    file = folder / "adapter_model.safetensors"
    older = file.with_suffix(".bin")  # PEFT's default until 0.6
    tensors = Tensors([older if older.is_file() and not file.is_file() else file])
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            raise BadInput(f"{folder}: the tensor {key} is not of a plain LoRA on linear layers; merge it with PEFT.")
        found.setdefault(match["module"], {})[match["part"]] = key
    if not found:
        raise BadInput(f"{folder} holds no LoRA layer; give the folder that `save_pretrained` wrote.")
    factors = {}
    for module, keys in found.items():
        if set(keys) != {"A", "B"}:
            raise BadInput(f"{folder}: {module} has only one of lora_A and lora_B; copy the adapter again.")
        a, b = tensors.array(keys["A"]), tensors.array(keys["B"])
        if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise BadInput(f"{folder}: {module} has A {a.shape} and B {b.shape}, which do not multiply; copy it again.")
        factors[module] = (a, b * np.float32(_scale(settings, module, a.shape[0], folder)))
    return factors


def _scale(settings: dict, module: str, rank: int, folder: Path) -> float:
    """PEFT's scale of one layer: alpha / r, or alpha / √r when rank-stabilised; patterns override alpha."""
    alpha = settings.get("lora_alpha")
    try:
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
    except (AttributeError, re.error) as error:
        raise BadInput(
            f"{folder / 'adapter_config.json'}: alpha_pattern cannot be used ({error}); copy it from the training run."
        ) from error
    if not isinstance(alpha, (int, float)):
        raise BadInput(f"{folder / 'adapter_config.json'} lacks lora_alpha; copy it from the training run.")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
