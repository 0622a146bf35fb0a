"""The private places of PEFT and TRL that MUE touches; if one fails, read the change log, then mend trainer/mue."""

from __future__ import annotations

import inspect

from peft import PeftType, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from trl.trainer import dpo_trainer

import trainer.mue  # noqa: F401  (registers the method)


def test_the_method_tables_exist_and_hold_mue() -> None:
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        assert "MUE" in getattr(mapping, name)


def test_the_enum_is_still_closed() -> None:
    # When PEFT opens it (or takes the name), registration should go through its front door.
    assert "MUE" not in list(PeftType)


def test_the_tuner_hooks_exist() -> None:
    assert callable(BaseTuner._replace_module)
    assert callable(BaseTunerLayer._move_adapter_to_device_of_base_layer)
    assert list(inspect.signature(BaseTuner._prepare_model).parameters) == ["self", "peft_config", "model"]
    assert list(inspect.signature(BaseTuner._check_target_module_exists).parameters) == ["peft_config", "key"]


def test_targets_are_checked_before_the_first_layer_is_replaced() -> None:
    source = inspect.getsource(BaseTuner.inject_adapter)
    assert source.index("self._prepare_model(") < source.index("self._create_and_replace(")


def test_trl_still_calls_the_reference_adapter_ref() -> None:
    assert 'model.add_adapter("ref", default_config)' in inspect.getsource(dpo_trainer.DPOTrainer)
