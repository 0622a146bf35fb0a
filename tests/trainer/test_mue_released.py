"""Adapters in the released code's layout, imported and compared with the published layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from trainer.mue import MueError, MueLinear
from trainer.mue.released import import_released

R, EXPERTS, ALPHA = 3, 4, 12
HIDDEN, FFN, LAYERS = 16, 24, 2
SHAPES = {"gate_proj": (HIDDEN, FFN), "up_proj": (HIDDEN, FFN), "down_proj": (FFN, HIDDEN)}
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": R,
    "lora_alpha": ALPHA,
    "lora_nums": EXPERTS,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": list(SHAPES),
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "inference_mode": True,
    "init_lora_weights": True,
}


def _released_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for name, (inputs, outputs) in SHAPES.items():
            module = f"base_model.model.model.layers.{layer}.mlp.{name}"
            tensors[f"{module}.lora_moe_A"] = torch.randn(EXPERTS, inputs, R)
            tensors[f"{module}.lora_moe_B"] = torch.randn(EXPERTS, R, outputs)
            tensors[f"{module}.lora_route.weight"] = torch.randn(EXPERTS - 1, inputs)
            tensors[f"{module}.w_noise"] = torch.randn(inputs, EXPERTS - 1)
    return tensors


@pytest.fixture
def released(tmp_path: Path) -> Path:
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    save_file(_released_tensors(), folder / "adapter_model.safetensors")
    return folder


def _change_settings(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | changes))


def _change_tensors(folder: Path, change: Any) -> dict[str, torch.Tensor]:
    tensors = change(_released_tensors())
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def _load(folder: Path) -> Any:
    base = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=20,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    return PeftModel.from_pretrained(base, str(folder)).eval()


def _published(tensors: dict[str, torch.Tensor], module: str, x: torch.Tensor, scaling: float) -> torch.Tensor:
    """What the released layer adds to its base for x [b, n, in], without its noise."""
    logits = nn.functional.linear(x, tensors[f"{module}.lora_route.weight"])
    gates = torch.softmax(logits, dim=-1)
    experts = torch.einsum("bnd,edh->bneh", x, tensors[f"{module}.lora_moe_A"])
    experts = torch.einsum("bneh,ehd->bned", experts, tensors[f"{module}.lora_moe_B"]) * scaling
    return experts[:, :, 0] + (experts[:, :, 1:] * gates.unsqueeze(-1)).sum(dim=2)


def _assert_same_layers(model: Any, tensors: dict[str, torch.Tensor], scaling: float) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MueLinear)}
    assert len(layers) == LAYERS * len(SHAPES)
    for name, layer in layers.items():
        x = torch.randn(2, 5, layer.in_features)
        with torch.no_grad():
            added = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(added, _published(tensors, name, x, scaling), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_imported_layers_compute_the_published_formula(released: Path, tmp_path: Path, rank_stabilised: bool) -> None:
    _change_settings(released, use_rslora=rank_stabilised)
    import_released(released, tmp_path / "ours")
    model = _load(tmp_path / "ours")
    _assert_same_layers(model, _released_tensors(), ALPHA / (math.sqrt(R) if rank_stabilised else R))
    for name, tensor in _released_tensors().items():
        if name.endswith("w_noise"):
            noise = model.get_parameter(name.replace("w_noise", "mue_noise.default.weight"))
            assert torch.equal(noise, tensor.T)


def test_the_files_are_standard_peft(released: Path, tmp_path: Path) -> None:
    import_released(released, tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MUE"
    assert (config["r"], config["alpha"], config["num_specific"]) == (R, ALPHA, EXPERTS - 1)
    assert set(config["target_modules"]) == set(SHAPES)
    assert config["base_model_name_or_path"] == "base"
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    down = "base_model.model.model.layers.1.mlp.down_proj.mue_"
    assert tensors[f"{down}A.weight"].shape == (EXPERTS * R, FFN)
    assert tensors[f"{down}B.weight"].shape == (HIDDEN, EXPERTS * R)
    assert tensors[f"{down}route.weight"].shape == tensors[f"{down}noise.weight"].shape == (EXPERTS - 1, FFN)
    with pytest.raises(MueError, match="exists already"):
        import_released(released, tmp_path / "ours")


def test_a_raw_state_dict_with_its_frozen_base(released: Path, tmp_path: Path) -> None:
    # As the trainer dumps it: adapter names in the keys, the base beside the experts, half-precision noise.
    raw = {}
    for key, tensor in _released_tensors().items():
        raw[f"{key}.default" if "lora_moe" in key else key] = tensor.half() if "w_noise" in key else tensor
    raw["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"] = torch.randn(FFN, HIDDEN)
    raw["base_model.model.lm_head.weight"] = torch.randn(20, HIDDEN)
    (released / "adapter_model.safetensors").unlink()
    torch.save(raw, released / "adapter_model.bin")
    import_released(released, tmp_path / "ours")
    imported = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert len(imported) == LAYERS * len(SHAPES) * 4
    assert {tensor.dtype for tensor in imported.values()} == {torch.float32}
    _assert_same_layers(_load(tmp_path / "ours"), _released_tensors(), ALPHA / R)


def test_dropped_routers_are_refused_or_replaced_by_uniform_gates(released: Path, tmp_path: Path) -> None:
    # The released filter: the tensor's name must hold "lora_" and the adapter's name, which is cut out afterwards.
    tensors = _change_tensors(released, lambda all_: {k: v for k, v in all_.items() if "lora_moe" in k})
    with pytest.raises(MueError, match=r"no router weights.*pytorch_model\.bin.*uniform gates"):
        import_released(released, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    import_released(released, tmp_path / "ours", uniform_gates=True)
    model = _load(tmp_path / "ours")
    zero = {f"{k.removesuffix('lora_moe_A')}lora_route.weight": torch.zeros(EXPERTS - 1, v.shape[1])
            for k, v in tensors.items() if k.endswith("lora_moe_A")}  # fmt: skip
    _assert_same_layers(model, tensors | zero, ALPHA / R)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    torch.testing.assert_close(layer.gates(torch.randn(2, HIDDEN)), torch.full((2, 3), 1 / 3))


UP = "base_model.model.model.layers.0.mlp.up_proj."


def _tensors(change: Any) -> Any:
    return lambda folder: _change_tensors(folder, change)


def _settings(**changes: Any) -> Any:
    return lambda folder: _change_settings(folder, **changes)


DAMAGE: dict[str, tuple[Any, str]] = {
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "settings cut": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "already ours": (_settings(peft_type="MUE"), "not of an adapter of the released code"),
    "no number of experts": (_settings(lora_nums=None), "lacks r, lora_nums or lora_alpha"),
    "one expert": (_settings(lora_nums=1), "num_specific=0"),
    "other number of experts": (
        _settings(lora_nums=3),
        r"lora_moe_A has the shape .*3 experts.*lora_nums",
    ),
    "other rank": (_settings(r=2), r"make it \[4, \d+, 2\]"),
    "foreign options": (_settings(use_dora=True, bias="all"), "sets use_dora, bias, which MUE does not have"),
    "whole modules": (_settings(modules_to_save=["lm_head"]), "sets modules_to_save"),
    "ranks by module": (_settings(rank_pattern={"up_proj": 4}), "sets rank_pattern"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
    "tensors cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"cut"), "cannot be read .*again"),
    "expert missing": (_tensors(lambda t: {k: t[k] for k in t if k != f"{UP}lora_moe_B"}), "up_proj lacks lora_moe_B"),
    "noise transposed": (_tensors(lambda t: t | {f"{UP}w_noise": torch.zeros(3, 16)}), "w_noise has the shape"),
    "flat expert": (_tensors(lambda t: t | {f"{UP}lora_moe_A": torch.zeros(4)}), "lora_moe_A has the shape"),
    "not a number": (_tensors(lambda t: t | {f"{UP}lora_route.weight": torch.full((3, 16), math.nan)}), "NaN"),
    "plain LoRA": (_tensors(lambda t: t | {f"{UP}lora_A.weight": torch.zeros(3, 16)}), "another method's"),
    "no experts": (_tensors(lambda t: {"lm_head.weight": torch.zeros(2)}), "holds no lora_moe_A"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_input_is_refused_with_its_cause(released: Path, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(released)
    with pytest.raises(MueError, match=message):
        import_released(released, tmp_path / "ours")
    assert not list(tmp_path.glob("ours*"))


@pytest.mark.parametrize("content", [b"", b"cut", b"PK\x03\x04 cut"])
def test_a_damaged_bin_file_is_refused(released: Path, tmp_path: Path, content: bytes) -> None:
    (released / "adapter_model.safetensors").unlink()
    (released / "adapter_model.bin").write_bytes(content)
    with pytest.raises(MueError, match=r"cannot be read|is damaged"):
        import_released(released, tmp_path / "ours")


class _Intruder:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


def test_code_in_a_bin_file_is_not_run(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (released / "adapter_model.safetensors").unlink()
    torch.save({"x": _Intruder()}, released / "adapter_model.bin")
    with pytest.raises(MueError, match="holds more than tensors"):
        import_released(released, tmp_path / "ours")
    assert "code was run" not in capsys.readouterr().out
