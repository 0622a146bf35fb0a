"""Mixture of universal-specific experts as a PEFT method; importing this package registers it.

`peft.register_peft_method` refuses names outside its enum, but the enum's members are strings, so three
plain entries in PEFT's own tables are enough (contract test: tests/trainer/test_mue_peft_contract.py).
"""

from peft import mapping as _mapping

from trainer.mue.config import MUE_TYPE, MueConfig, MueError
from trainer.mue.layer import MueLinear
from trainer.mue.model import MueModel

_mapping.PEFT_TYPE_TO_CONFIG_MAPPING[MUE_TYPE] = MueConfig  # type: ignore[index]
_mapping.PEFT_TYPE_TO_TUNER_MAPPING[MUE_TYPE] = MueModel  # type: ignore[index]
_mapping.PEFT_TYPE_TO_PREFIX_MAPPING[MUE_TYPE] = MueModel.prefix  # type: ignore[index]

__all__ = ["MUE_TYPE", "MueConfig", "MueError", "MueLinear", "MueModel"]
