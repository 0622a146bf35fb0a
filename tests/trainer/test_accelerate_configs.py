"""The shipped launcher files are files that this accelerate understands, key by key, and do what their headers say."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from rich.console import Console
from torch.distributed.fsdp import StateDictType
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from trainer.recipe import PROJECT, SHIPPED, RecipeError, load_recipe, shipped_recipes
from trainer.run import Run

FOLDER = SHIPPED / "accelerate"
NAMES = ("ddp", "fsdp2", "zero3")


def test_these_files_are_shipped_and_no_recipes():
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)
    assert not set(NAMES) & set(shipped_recipes())


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses unknown keys of the first level
    options = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options
    assert config.num_machines == 1
    assert config.mixed_precision == "bf16"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_an_unknown_key_would_be_refused(name, tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text((FOLDER / f"{name}.yaml").read_text(encoding="utf-8") + "num_proceses: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(file))


@pytest.mark.parametrize("name", NAMES)
def test_the_header_holds_a_command_that_works(name):
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    commands = re.findall(r"--config_file (\S+).*?-m pediatricsgpt train (\S+)", text.replace("\\\n#", ""))
    assert commands
    for file, recipe in commands:
        assert PROJECT / file == FOLDER / f"{name}.yaml"
        assert recipe in shipped_recipes()


def test_ddp_starts_one_process_for_each_gpu():
    arguments = _launched("ddp")
    assert arguments.multi_gpu
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (False, False)
    assert prepare_multi_gpu_env(arguments)["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fsdp2_shards_by_layer_and_frees_layers_after_use(monkeypatch):
    arguments = _launched("fsdp2")
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    assert os.environ["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    # The policy finds the layers by the models' own lists: all architectures of our recipes have one.
    for model in (Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM):
        assert any(name.endswith("DecoderLayer") for name in model._no_split_modules)


def test_zero3_shards_everything_and_gathers_whole_weights_to_save():
    arguments = _launched("zero3")
    assert arguments.use_deepspeed
    arguments.deepspeed_fields_from_accelerate_config = []
    _, environment = prepare_deepspeed_cmd_env(arguments)
    expected = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    assert expected.items() <= environment.items()
    # Batch, accumulation and clipping differ between stages: the recipe gives them, the file must not.
    settings = yaml.safe_load((FOLDER / "zero3.yaml").read_text(encoding="utf-8"))["deepspeed_config"]
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & settings.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_kind_of_parallelism_is_the_one_of_the_name(name):
    expected = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}
    assert load_config_from_file(str(FOLDER / f"{name}.yaml")).distributed_type == expected[name]


def test_a_run_refuses_checkpointing_by_fsdp(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    recipe = load_recipe(PROJECT / "tests" / "recipes" / "tiny.yaml", ["device=cpu"])
    with pytest.raises(RecipeError, match="activation_checkpointing=true"):
        Run(recipe, tmp_path / "run", tmp_path / "corpus", Console(quiet=True))


def _launched(name: str):
    """The launcher's arguments after it has read the file, as in `accelerate launch --config_file FILE`."""
    file = str(Path(FOLDER / f"{name}.yaml"))
    arguments = launch_command_parser().parse_args(["--config_file", file, "-m", "pediatricsgpt", "train"])
    return _validate_launch_command(arguments)[0]
