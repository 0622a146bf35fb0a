"""The PEFT tuner that puts `MueLinear` around a model's target modules."""

from __future__ import annotations

from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from trainer.mue.config import MueConfig
from trainer.mue.layer import MueLinear

_FFN = ["gate_proj", "up_proj", "down_proj"]


class MueModel(BaseTuner):
    """PEFT tuner for MUE; saving, loading, freezing and `disable_adapter` are PEFT's own."""

    prefix = "mue_"
    tuner_layer_cls = MueLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {name: _FFN for name in ("qwen3", "qwen2", "llama")}

    def _create_and_replace(
        self,
        peft_config: MueConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, MueLinear):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise ValueError(
                f"MUE can be put on linear layers only, but {current_key} is a {type(base).__name__}; "
                "take it out of target_modules."
            )
        layer = MueLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
