"""MUE against an independent float64 computation, and its life inside PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from trainer.mue import MueConfig, MueError, MueLinear

IN, OUT, R, N, ALPHA = 12, 20, 3, 2, 6.0
PARTS = ("A", "B", "route", "noise")


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
    a, b, route, spread = (layer.get_parameter(f"mue_{part}.default.weight") for part in PARTS)
    a, b = a.view(1 + N, R, IN), b.view(OUT, 1 + N, R).permute(1, 0, 2)
    logits = x @ route.T
    if noise is not None:
        logits = logits + noise * torch.log1p(torch.exp(x @ spread.T))
    gates = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    experts = torch.einsum("btd,erd->bter", x, a)
    experts = torch.einsum("bter,eor->bteo", experts, b)
    weights = torch.cat([torch.ones_like(gates[..., :1]), gates], dim=-1)
    return layer.base_layer(x) + ALPHA / R * torch.einsum("bteo,bte->bto", experts, weights)


@pytest.mark.parametrize("training", [False, True])
def test_forward_and_all_gradients_equal_the_published_formula(layer: MueLinear, training: bool) -> None:
    layer.train(training)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    tensors = [x, layer.base_layer.weight, *(layer.get_parameter(f"mue_{part}.default.weight") for part in PARTS)]
    target = torch.randn(2, 5, OUT, dtype=torch.float64)
    torch.manual_seed(1)
    noise = torch.randn(2, 5, N, dtype=torch.float64) if training else None
    torch.manual_seed(1)
    ours, theirs = layer(x), published(layer, x, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    loss, reference = (((output - target) ** 2).sum() for output in (ours, theirs))
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
    expected = torch.autograd.grad(reference, tensors, allow_unused=True)
    assert all(g is not None and g.abs().max() > 1e-3 for g in gradients[:-1])
    assert (gradients[-1] is None) is not training  # the noise is learnt while training, and absent otherwise
    for mine, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


def test_outside_training_the_output_does_not_vary(layer: MueLinear) -> None:
    x = torch.randn(1, 4, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    # Loaded for inference, but left in training mode: nobody learns from the noise.
    layer.train().requires_grad_(False)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 3, 4, IN)])
def test_any_number_of_leading_dimensions(layer: MueLinear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    output = layer.eval()(x)
    assert output.shape == (*shape[:-1], OUT)
    wanted = published(layer, x.reshape(1, -1, IN)).reshape(output.shape)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("base", "experts", "inputs", "autocast"),
    [
        (torch.float32, torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, torch.bfloat16, False),  # how PEFT keeps adapters of a bfloat16 model
        (torch.float32, torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, torch.float32, True),
    ],
)
def test_every_dtype_stays_near_float64(
    layer: MueLinear, base: torch.dtype, experts: torch.dtype, inputs: torch.dtype, autocast: bool
) -> None:
    layer.eval()
    x = torch.randn(2, 7, IN, dtype=torch.float64)
    wanted = published(layer, x)
    wanted_gradients = torch.autograd.grad(wanted.sum(), [layer.get_parameter(f"mue_{p}.default.weight") for p in "AB"])
    layer.to(experts).base_layer.to(base)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x.to(inputs))
    assert output.dtype == (torch.bfloat16 if autocast else inputs)
    exact = {base, experts, inputs} == {torch.float32} and not autocast
    tolerance = 1e-5 if exact else 3e-2
    assert (output.double() - wanted).norm() < tolerance * wanted.norm()
    output.sum().backward()
    for part, reference in zip("AB", wanted_gradients, strict=True):
        gradient = layer.get_parameter(f"mue_{part}.default.weight").grad
        assert gradient is not None
        assert gradient.dtype == experts
        assert (gradient.double() - reference).norm() < tolerance * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gates_are_a_distribution_of_at_least_float32(layer: MueLinear, dtype: torch.dtype) -> None:
    x = torch.randn(3, IN, dtype=dtype)
    gates = layer.to(dtype).gates(x)
    assert gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gates.sum(-1), torch.ones(3, dtype=gates.dtype))
    assert torch.equal(gates, layer.gates(x))  # free of noise, also while training


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


def _with_experts(targets: list[str] | str | None = None) -> PeftModel:
    """A tiny model whose experts do something: their output projections are not zero."""
    config = MueConfig(r=R, num_specific=N, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(_tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "mue_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_adapter_survives_saving_and_loading(tmp_path) -> None:
    model = _with_experts()
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


def test_several_adapters_live_side_by_side(tmp_path) -> None:
    model = _with_experts().eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        first = model(tokens).logits
        model.add_adapter("second", MueConfig(r=R + 1, num_specific=N + 1, task_type="CAUSAL_LM"))
        assert torch.equal(model(tokens).logits, first)
        model.set_adapter("second")
        assert torch.equal(model(tokens).logits, _tiny_model()(tokens).logits)  # its experts are still zero
        for name, parameter in model.named_parameters():
            if "mue_B.second" in name:
                nn.init.normal_(parameter, std=0.1)
        second = model(tokens).logits
        model.base_model.set_adapter(["default", "second"])  # type: ignore[operator]
        layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        x, both = torch.randn(4, 16), 0.0
        assert isinstance(layer, MueLinear)
        for name in ("default", "second"):
            layer.set_adapter(name)
            both = both + layer(x) - layer.base_layer(x)
        layer.set_adapter(["default", "second"])
        torch.testing.assert_close(layer(x), layer.base_layer(x) + both)
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_tiny_model(), tmp_path / "second", adapter_name="second").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, second)


def test_only_mue_parameters_train_and_have_one_dtype() -> None:
    base = _tiny_model().bfloat16()
    model = get_peft_model(base, MueConfig(r=R, num_specific=N, task_type="CAUSAL_LM"))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 3 * 4  # layers × gate/up/down × A, B, route, noise
    assert all("mue_" in name for name in trained)
    assert len({parameter.dtype for parameter in trained.values()}) == 1  # FSDP2 shards no mixture


def test_all_linear_leaves_the_head_out() -> None:
    adapted = [name for name, module in _with_experts("all-linear").named_modules() if isinstance(module, MueLinear)]
    assert len(adapted) == 2 * 7
    assert not any("lm_head" in name for name in adapted)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate_proj", "w2"], r"no module w2; its linear layers are called down_proj, gate_proj, k_proj.*all-linear"),
        (r".*\.w[12]", r"no module .*its linear layers"),
        (["lm_head", "up_proj"], r"output head \(lm_head\).*Take it out"),
        (["embed_tokens"], "linear layers only, but model.embed_tokens is a Embedding"),
        (r"model\.layers\.0\.mlp", "linear layers only, but model.layers.0.mlp is a Qwen3MLP"),
    ],
)
def test_targets_that_do_not_fit_leave_the_model_untouched(targets: list[str] | str, message: str) -> None:
    model = _tiny_model()
    with pytest.raises(MueError, match=message):
        get_peft_model(model, MueConfig(target_modules=targets))
    assert not any(isinstance(module, MueLinear) for module in model.modules())


def test_a_base_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(MueError, match="it has none"):
        get_peft_model(model, MueConfig())
    with pytest.raises(MueError, match="is a Conv1D"):
        get_peft_model(model, MueConfig(target_modules="all-linear"))


def test_a_second_adapter_is_checked_like_the_first() -> None:
    with pytest.raises(MueError, match=r"no module mue_A; its linear layers are called down_proj"):
        _with_experts().add_adapter("second", MueConfig(target_modules=["mue_A"]))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(MueError, match="r ≥ 1"):
        MueConfig(r=0)
    with pytest.raises(MueError, match="num_specific=0"):
        MueConfig(num_specific=0)


def test_merging_names_the_way_that_works() -> None:
    with pytest.raises(NotImplementedError, match="pediatricsgpt quantize"):
        _with_experts().merge_and_unload()
