"""The PEFT tuner that puts `MueLinear` around a model's target modules."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from trainer.mue.config import MueConfig, MueError
from trainer.mue.layer import MueLinear


class MueModel(BaseTuner):
    """PEFT tuner for MUE; saving, loading, freezing and `disable_adapter` are PEFT's own.

    Raises MueError when the targets do not fit the model, before any layer is replaced.
    """

    prefix = "mue_"
    tuner_layer_cls = MueLinear

    def _prepare_model(self, peft_config: MueConfig, model: nn.Module) -> None:
        targets = peft_config.target_modules or ()
        if targets == "all-linear":  # PEFT finds them, and leaves the output head out
            return
        modules = _modules_outside_adapters(model)
        found = [name for name in modules if self._check_target_module_exists(peft_config, name)]
        if isinstance(targets, str):
            missing = [] if found else [targets]
        else:
            missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules)]
        head = _output_head(model)
        if missing:
            linear = {name.rpartition(".")[2] for name, module in modules.items() if _is_linear(module, head)}
            raise MueError(
                f"The base model has no module {', '.join(sorted(missing))}; "
                f"its linear layers are called {', '.join(sorted(linear)) or 'nothing: it has none'}. "
                'Name some of these in target_modules, or give "all-linear".'
            )
        for name in found:
            if modules[name] is head:
                raise MueError(
                    f"MUE cannot be put on the output head ({name}): the trainers read the head's weight directly "
                    "to avoid building all logits, so experts there would never be used. "
                    "Take it out of target_modules."
                )
            _refuse_non_linear(name, modules[name])

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
        _refuse_non_linear(current_key, target)  # again, because "all-linear" is known only now
        layer = MueLinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _modules_outside_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, without those inside an adapter that is already there."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {name: module for name, module in model.named_modules() if name and not name.startswith(adapted)}


def _output_head(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find else None


def _is_linear(module: nn.Module, head: nn.Module | None = None) -> bool:
    """Whether it is a linear layer (bitsandbytes' are subclasses), adapted or not, and not the head."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return isinstance(base, nn.Linear) and module is not head


def _refuse_non_linear(name: str, module: nn.Module) -> None:
    if not _is_linear(module):
        raise MueError(
            f"MUE can be put on linear layers only, but {name} is a {type(module).__name__}; "
            "take it out of target_modules."
        )
