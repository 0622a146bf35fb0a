"""MUE against an independent float64 computation, and its life inside PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from trainer.mue import MueConfig, MueLinear

IN, OUT, R, N, ALPHA = 12, 20, 3, 2, 6.0


@pytest.fixture
def layer() -> MueLinear:
    torch.manual_seed(0)
    layer = MueLinear(nn.Linear(IN, OUT, bias=False), "default", MueConfig(r=R, alpha=ALPHA, num_specific=N)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_(True)
    return layer


def published(layer: MueLinear, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """The published formulation: every expert's output is built, then weighted and summed."""
    a = layer.mue_A["default"].weight.view(1 + N, R, IN)
    b = layer.mue_B["default"].weight.view(OUT, 1 + N, R).permute(1, 0, 2)
    logits = x @ layer.mue_route["default"].weight.T
    if noise is not None:
        logits = logits + noise * torch.log1p(torch.exp(x @ layer.mue_noise["default"].weight.T))
    gates = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    experts = torch.einsum("btd,erd->bter", x, a)
    experts = torch.einsum("bter,eor->bteo", experts, b)
    weights = torch.cat([torch.ones_like(gates[..., :1]), gates], dim=-1)
    return layer.base_layer(x) + ALPHA / R * torch.einsum("bteo,bte->bto", experts, weights)


def test_forward_and_all_gradients_equal_the_published_formula(layer: MueLinear) -> None:
    layer.eval()
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    tensors = [x, *(layer.get_parameter(f"mue_{name}.default.weight") for name in ("A", "B", "route"))]
    target = torch.randn(2, 5, OUT, dtype=torch.float64)
    ours = torch.autograd.grad(((layer(x) - target) ** 2).sum(), tensors)
    theirs = torch.autograd.grad(((published(layer, x) - target) ** 2).sum(), tensors)
    # The softmax is in float32 on purpose; everything else is exact.
    torch.testing.assert_close(layer(x), published(layer, x), rtol=1e-5, atol=1e-5)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_noise_trains_and_is_off_in_eval(layer: MueLinear) -> None:
    x = torch.randn(1, 4, IN, dtype=torch.float64)
    layer.train()
    torch.manual_seed(1)
    noise = torch.randn(1, 4, N)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), published(layer, x, noise.double()), rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    grad = layer.mue_noise["default"].weight.grad
    assert grad is not None
    assert grad.abs().max() > 0
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_gates_are_a_float32_distribution(layer: MueLinear) -> None:
    gates = layer.eval().gates(torch.randn(3, IN, dtype=torch.float64))
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(-1), torch.ones(3))


def _tiny_model() -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    ).eval()


def test_adapter_survives_saving_and_loading(tmp_path) -> None:
    model = get_peft_model(_tiny_model(), MueConfig(r=R, num_specific=N, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "mue_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(_tiny_model(), tmp_path).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        assert torch.equal(loaded(tokens).logits, expected)
        with loaded.disable_adapter():
            assert torch.equal(loaded(tokens).logits, _tiny_model()(tokens).logits)
        assert not torch.equal(expected, _tiny_model()(tokens).logits)


def test_only_mue_parameters_train() -> None:
    model = get_peft_model(_tiny_model(), MueConfig(r=R, num_specific=N, task_type="CAUSAL_LM"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 3 * 4  # layers × gate/up/down × A, B, route, noise
    assert all("mue_" in name for name in trained)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="r ≥ 1"):
        MueConfig(r=0)
    with pytest.raises(ValueError, match="linear layers only"):
        get_peft_model(_tiny_model(), MueConfig(target_modules=["embed_tokens"]))
