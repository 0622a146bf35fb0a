"""The private places of PEFT that MUE touches; a failure here means: read PEFT's change log, then mend trainer/mue."""

from __future__ import annotations

from peft import PeftType, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

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
