"""Merging against independent computations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, Qwen3ForCausalLM

from quantize import cli, header
from quantize.experts import Adapter, Merge, expert_coefficients
from quantize.live import Live
from quantize.merging import measure_merge, merge_sentence
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
    merge = Merge(adapter, method, dict.fromkeys(adapter.layers, np.array([0.2, 0.7, 0.1])))
    expected = dense_delta(tiny, LAYER, np.array(gates))
    found = merge.delta_rows(LAYER, 0, len(expected))
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    middle = merge.delta_rows(LAYER, 10, 20)
    assert middle is not None
    np.testing.assert_allclose(middle, expected[10:20], rtol=0, atol=1e-6 * np.abs(expected).max())
    assert merge.delta_rows("model.layers.1.self_attn.q_proj", 0, 1) is None


def test_unknown_method_is_an_error() -> None:
    with pytest.raises(ValueError, match="average"):
        expert_coefficients("average", 3, None)


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


def test_usage_gates_and_exported_weight_equal_a_hand_computation(tiny: Path, tmp_path: Path) -> None:
    gates = hand_gates(tiny, LAYER)
    assert gates.max() - gates.min() > 0.02  # else uniform merging would pass as well
    live = Live(tiny / "3-dfpo", tiny / "4-mue")
    usage, _ = live.measure(live.tokenise(RunFolder.open(tiny).calibration), lambda: None)
    np.testing.assert_allclose(usage[LAYER], gates, atol=1e-6)
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist"), "--quant", "F32"]) == 0
    written = header.read(tmp_path / "dist/tiny-F32.gguf").rows("blk.1.ffn_up.weight", 0, 128)
    base = load_file(tiny / "3-dfpo/model.safetensors")[f"{LAYER}.weight"]
    np.testing.assert_allclose(written, base + dense_delta(tiny, LAYER, gates), atol=2e-6)


def test_with_constant_gates_merging_loses_nothing(damaged: Path) -> None:
    file = damaged / "4-mue/adapter_model.safetensors"
    tensors = {k: np.zeros_like(v) if "route" in k else v for k, v in load_file(file).items()}
    save_file(tensors, file)
    run = RunFolder.open(damaged)
    live = Live(run.checkpoint, run.adapter)
    _, report = measure_merge(live, Adapter(run.adapter), run, "usage", lambda *_: None)
    assert report["nll_merged"] == pytest.approx(report["nll_live"], abs=1e-5)
    assert report["nll_base"] != pytest.approx(report["nll_live"], abs=1e-3)


def test_losses_are_those_of_the_assistant_tokens(tiny: Path) -> None:
    run = RunFolder.open(tiny)
    live = Live(run.checkpoint, run.adapter)
    dialogues = live.tokenise(run.calibration)
    texts = [live.tokenizer.decode([i for i, mark in zip(d.ids, d.assistant, strict=True) if mark]) for d in dialogues]
    assert texts == [d.messages[-1]["content"] + "<|im_end|>" for d in run.calibration]
    model = Qwen3ForCausalLM.from_pretrained(tiny / "3-dfpo", dtype=torch.float32)
    total, count = 0.0, 0
    for dialogue in dialogues:
        labels = torch.tensor([[i if mark else -100 for i, mark in zip(dialogue.ids, dialogue.assistant, strict=True)]])
        tokens = sum(dialogue.assistant)
        loss = model(input_ids=torch.tensor([dialogue.ids]), labels=labels).loss
        total, count = total + loss.item() * tokens, count + tokens
    assert live.base_loss(dialogues, lambda: None) == pytest.approx(total / count, abs=1e-5)


def test_says_so_when_the_experts_gained_nothing(damaged: Path) -> None:
    file = damaged / "4-mue/adapter_model.safetensors"
    save_file({k: np.zeros_like(v) if "mue_B" in k else v for k, v in load_file(file).items()}, file)
    run = RunFolder.open(damaged)
    live = Live(run.checkpoint, run.adapter)
    _, report = measure_merge(live, Adapter(run.adapter), run, "usage", lambda *_: None)
    assert report["kept"] is None
    assert "gained nothing" in merge_sentence(report)
