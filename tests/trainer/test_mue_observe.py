"""Router observability against gates computed by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from peft import get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from trainer.mue import MueConfig, MueError, MueLinear
from trainer.mue.observe import RouterStatistics, gate_figure, gate_heat_map, observe

N = 3
BATCHES = {
    "knowledge": {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
                  "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])},
    "diagnosis": {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)},
}  # fmt: skip


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    model = get_peft_model(base, MueConfig(r=2, num_specific=N, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "mue_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _gates_by_hand(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every layer's gates [real tokens, N], from the inputs that reach it and the saved router weights."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MueLinear)}
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, x, __, name=name: inputs.update({name: x[0]}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool()
    gates = {}
    for name, x in inputs.items():
        route = model.get_parameter(f"{name}.mue_route.default.weight").detach().double()
        logits = torch.exp(x[real].double() @ route.T)
        gates[name.removeprefix("base_model.model.")] = logits / logits.sum(-1, keepdim=True)
    return gates


def _observe(model: Any) -> RouterStatistics:
    with observe(model) as statistics, torch.no_grad():
        for task, batch in BATCHES.items():
            statistics.task = task
            model(**batch)
    return statistics


def test_usage_and_entropy_equal_direct_computation(model: Any) -> None:
    statistics = _observe(model)
    by_hand = {task: _gates_by_hand(model, batch) for task, batch in BATCHES.items()}
    assert statistics.tasks == list(BATCHES)
    for task, layers in by_hand.items():
        assert set(statistics.usage(task)) == set(layers)
        for layer, gates in layers.items():
            torch.testing.assert_close(statistics.usage(task)[layer], gates.mean(0), rtol=1e-5, atol=1e-6)
            entropy = -(gates * gates.log()).sum(-1).mean().item()
            assert statistics.entropy(task)[layer] == pytest.approx(entropy, rel=1e-5)
    for layer, usage in statistics.usage().items():
        together = torch.cat([layers[layer] for layers in by_hand.values()])
        torch.testing.assert_close(usage, together.mean(0), rtol=1e-5, atol=1e-6)


def test_figures_equal_direct_computation(model: Any) -> None:
    figures = _observe(model).figures()
    tasks = [_gates_by_hand(model, batch) for batch in BATCHES.values()]
    together = [torch.cat([task[layer] for task in tasks]) for layer in tasks[0]]
    entropies = [-(gates * gates.log()).sum(-1).mean().item() for gates in together]
    means = torch.stack([gates.mean(0) for gates in together])
    spread = [0.5 * (tasks[0][layer].mean(0) - tasks[1][layer].mean(0)).abs().sum().item() for layer in tasks[0]]
    assert figures == pytest.approx(
        {
            "router/entropy": sum(entropies) / 6,
            "router/entropy_relative": sum(entropies) / 6 / math.log(N),
            "router/usage_min": means.min().item(),
            "router/usage_max": means.max().item(),
            "router/task_spread": sum(spread) / 6,
        },
        rel=1e-5,
    )
    assert figures["router/task_spread"] > 0.01


def test_known_extremes() -> None:
    statistics = RouterStatistics()
    assert statistics.figures() == {}
    statistics.task = "one"
    statistics.add("layer", torch.tensor([[1.0, 0, 0], [1, 0, 0]]))
    figures = statistics.figures()
    assert figures["router/entropy"] == figures["router/usage_min"] == 0
    assert "router/task_spread" not in figures
    statistics.task = "other"
    statistics.add("layer", torch.tensor([[0.0, 1, 0], [0, 1, 0]]))
    assert statistics.figures()["router/task_spread"] == 1
    even = RouterStatistics()
    even.add("layer", torch.full((4, N), 1 / N))
    assert even.figures()["router/entropy_relative"] == pytest.approx(1)


def test_training_is_not_disturbed(model: Any) -> None:
    batch = BATCHES["diagnosis"] | {"labels": BATCHES["diagnosis"]["input_ids"]}
    model.train()
    gradients = []
    for watched in (False, True):
        torch.manual_seed(1)
        model.zero_grad()
        with observe(model) if watched else torch.enable_grad():
            model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    hooks = [module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)


def test_cached_generation_counts_every_token_once(model: Any) -> None:
    prompt = BATCHES["diagnosis"]
    with observe(model) as statistics:
        tokens = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones(1, tokens.shape[1] - 1, dtype=torch.int64)}
    by_hand = _gates_by_hand(model, whole)
    for layer, usage in statistics.usage().items():
        torch.testing.assert_close(usage, by_hand[layer].mean(0), rtol=1e-4, atol=1e-5)


def test_a_disabled_adapter_is_not_counted(model: Any) -> None:
    with observe(model) as statistics, model.disable_adapter():
        model(**BATCHES["diagnosis"])
    assert statistics.tasks == []


def test_what_cannot_be_observed_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(MueError, match="no MUE adapter 'second'"), observe(model, "second"):
        pass
    with pytest.raises(MueError, match="No gates were counted"):
        gate_heat_map(RouterStatistics(), tmp_path / "gates.png")


def test_the_heat_map_shows_every_gate(tmp_path: Path) -> None:
    statistics = RouterStatistics()
    for task, expert in (("knowledge", 0), ("diagnosis", 2)):
        statistics.task = task
        for layer, part in itertools.product(range(2), ("gate_proj", "up_proj")):
            statistics.add(f"model.layers.{layer}.mlp.{part}", torch.eye(N)[expert : expert + 1])
    figure = gate_figure(statistics)
    for panel, task, expert in zip(figure.axes, ("knowledge", "diagnosis"), (0, 2), strict=False):
        assert panel.get_title() == task
        assert panel.images[0].get_array().tolist() == [torch.eye(N)[expert].tolist()] * 4  # type: ignore[union-attr]
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == ["0 gate_proj", "0 up_proj", "1 gate_proj", "1 up_proj"]
    gate_heat_map(statistics, tmp_path / "plots" / "gates.png")
    picture = imread(tmp_path / "plots" / "gates.png")[..., :3]
    dark_red = (picture[..., 0] > 0.3) & (picture[..., 0] < 0.5) & (picture[..., 1] < 0.05)
    dark_blue = (picture[..., 2] > 0.3) & (picture[..., 2] < 0.45) & (picture[..., 0] < 0.05)
    assert dark_blue.sum() == pytest.approx(2 * dark_red.sum(), rel=0.15)  # one expert of three is used
