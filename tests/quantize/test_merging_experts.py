"""The experts of an adapter file, and constants for their gates, against independent computations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, Qwen3ForCausalLM

from quantize.architectures import for_config
from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput
from quantize.hugging_face import Tokenised
from quantize.live import Live
from quantize.merging.collect import mean_gates
from quantize.merging.constants import constant_gates
from quantize.merging.experts import Adapter
from quantize.merging.merge import thinned
from quantize.run_folder import RunFolder

LAYER = "model.layers.1.mlp.up_proj"


def dense_delta(run: Path, layer: str, gates: np.ndarray) -> np.ndarray:
    """s·(B_0 A_0 + Σ_e g_e B_e A_e) expert by expert, in float64."""
    config = json.loads((run / "4-mue/adapter_config.json").read_text())
    tensors = load_file(run / "4-mue/adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.mue_{part}.weight"].astype(np.float64) for part in "AB")
    rank, total = config["r"], np.zeros((b.shape[0], a.shape[1]))
    for expert, weight in enumerate([1.0, *gates]):
        part = slice(expert * rank, (expert + 1) * rank)
        total += weight * np.outer(b[:, part][:, 0], a[part][0])
        total += weight * np.outer(b[:, part][:, 1], a[part][1])
    return config["alpha"] / rank * total


@pytest.mark.parametrize(
    ("method", "gates"),
    [("usage", [0.2, 0.7, 0.1]), ("uniform", [1 / 3, 1 / 3, 1 / 3]), ("universal", [0, 0, 0])],
)
def test_delta_equals_the_dense_sum(tiny: Path, method: str, gates: list[float]) -> None:
    adapter = Adapter(tiny / "4-mue")
    merge = constant_gates(adapter, method, dict.fromkeys(adapter.layers, np.array([0.2, 0.7, 0.1])))
    expected = dense_delta(tiny, LAYER, np.array(gates))
    found = merge.delta_rows(LAYER, slice(None))
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    middle = merge.delta_rows(LAYER, slice(10, 20))
    assert middle is not None
    np.testing.assert_allclose(middle, expected[10:20], rtol=0, atol=1e-6 * np.abs(expected).max())
    picked = merge.delta_rows(LAYER, np.array([7, 3, 90]))
    assert picked is not None
    np.testing.assert_allclose(picked, expected[[7, 3, 90]], rtol=0, atol=1e-6 * np.abs(expected).max())
    assert merge.delta_rows("model.layers.1.self_attn.q_proj", slice(0, 1)) is None


def test_unknown_method_is_an_error(tiny: Path) -> None:
    with pytest.raises(ValueError, match="average"):
        constant_gates(Adapter(tiny / "4-mue"), "average")


def hand_gates(run: Path, layer: str) -> np.ndarray:
    """Mean softmax(x·W_route) over every token of every calibration dialogue, from the layer's recorded inputs."""
    tokenizer = AutoTokenizer.from_pretrained(run / "3-dfpo")
    base = Qwen3ForCausalLM.from_pretrained(run / "3-dfpo", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "4-mue").eval()
    inputs: list[torch.Tensor] = []
    module = model.get_submodule(f"base_model.model.{layer}.base_layer")
    assert isinstance(module, nn.Linear)
    module.register_forward_hook(lambda _m, args, _out: inputs.append(args[0][0].detach()))
    for line in (run / "calibration.jsonl").read_text(encoding="utf-8").splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        model(**tokenizer(text, return_tensors="pt"))
    x = torch.cat(inputs).double().numpy()
    route = load_file(run / "4-mue/adapter_model.safetensors")[f"base_model.model.{layer}.mue_route.weight"]
    logits = np.exp(x @ route.astype(np.float64).T)
    return (logits / logits.sum(-1, keepdims=True)).mean(0)


def test_mean_gates_equal_a_hand_computation(tiny: Path) -> None:
    gates = hand_gates(tiny, LAYER)
    assert gates.max() - gates.min() > 0.02  # else uniform merging would pass as well
    live = Live(tiny / "3-dfpo", tiny / "4-mue")
    usage = mean_gates(live, live.tokenise(RunFolder.open(tiny).calibration), lambda: None)
    np.testing.assert_allclose(usage[LAYER], gates, atol=1e-6)


def test_adapter_of_another_base_is_refused(tiny: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    """Other shapes, and layers that the model does not have."""
    checkpoint = Checkpoint(tiny / "3-dfpo")
    plans = for_config(checkpoint.config).plan(checkpoint.config)
    Adapter(tiny / "4-mue").check(plans)
    with pytest.raises(BadInput, match=r"mlp\..+ does not fit the model .+another base"):
        Adapter(make(tmp_path / "wider", hidden=96) / "4-mue").check(plans)
    with pytest.raises(BadInput, match=r"it has None.+another base"):
        Adapter(tiny / "4-mue").check([plan for plan in plans if "layers.1.mlp.up_proj" not in plan.source])


@pytest.mark.parametrize(("key", "value"), [("alpha", float("nan")), ("r", 0), ("r", float("inf")), ("r", None)])
def test_settings_that_make_no_scale_are_refused(damaged: Path, key: str, value: object) -> None:
    file = damaged / "4-mue/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(BadInput, match=r"lacks a usable r, alpha or num_specific"):
        Adapter(damaged / "4-mue")


def test_experts_that_are_no_matrices_are_refused(damaged: Path) -> None:
    file = damaged / "4-mue/adapter_model.safetensors"
    tensors = load_file(file)
    key = f"base_model.model.{LAYER}.mue_B.weight"
    save_file({**tensors, key: tensors[key].ravel()}, file)
    with pytest.raises(BadInput, match="no matrices"):
        Adapter(damaged / "4-mue")


@pytest.mark.parametrize("part", ["A", "route"])
def test_values_that_are_not_finite_are_refused(damaged: Path, part: str) -> None:
    file = damaged / "4-mue/adapter_model.safetensors"
    tensors = load_file(file)
    key = f"base_model.model.{LAYER}.mue_{part}.weight"
    tensors[key][1, 5] = np.nan
    save_file(tensors, file)
    with pytest.raises(BadInput, match=f"mue_{part}.+not finite.+train the run again"):
        Adapter(damaged / "4-mue")


def test_a_large_model_is_fitted_on_an_even_share_of_every_task() -> None:
    tasks = ("diagnosis", "knowledge", "treatment")
    dialogues = [Tokenised([0] * 100, [True] * 100, tasks[number % 3]) for number in range(90)]
    kept = thinned(dialogues, 3000)
    assert [sum(d.task == task for d in kept) for task in tasks] == [10, 10, 10]
    assert len({id(dialogue) for dialogue in kept}) == 30
    assert thinned(dialogues, 9000) is dialogues
    assert len(thinned(dialogues, 1)) == 1
