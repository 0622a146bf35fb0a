"""The importance matrix against a direct computation, and whether it helps where it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from peft import LoraConfig, get_peft_model
from random_checkpoint import blueprint
from transformers import Qwen3Config, Qwen3ForCausalLM

from quantize import header, importance, quantizer, writer
from quantize.architectures import TensorPlan
from quantize.checkpoint import Tensors
from quantize.errors import BadInput
from trainer.mue import MueConfig

SEQUENCES = [[5, 9, 3, 80, 41], [7], [2, 2, 60, 11, 30, 99, 4]]


def qwen3(hidden: int = 32, inner: int = 48, *, tied: bool = False, spread: float = 0.2) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=100, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, tie_word_embeddings=tied,
        initializer_range=spread,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # trained models use some columns far more than others
                parameter.mul_(torch.rand_like(parameter).mul_(3).exp_())
    return model


def directly(model: Any, modules: dict[str, torch.nn.Module]) -> dict[str, np.ndarray]:
    """Mean x² over all tokens of all sequences, from every input kept whole."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[[Any, Any], None]:
        return lambda _module, given: inputs[name].append(given[0][0].clone())

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        for ids in SEQUENCES:
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(kept).double().square().mean(0).numpy() for name, kept in inputs.items()}


def linear(model: Any) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_equals_a_direct_computation() -> None:
    model = qwen3()
    expected = directly(model, linear(model))
    done: list[int] = []
    found = importance.collect(model, SEQUENCES, done.append)
    assert found.means.keys() == expected.keys()
    assert "lm_head" in found.means
    for name, mean in expected.items():
        assert np.allclose(found.means[name], mean, rtol=1e-5), name
    assert (found.tokens, found.sequences, found.unseen, done) == (13, 3, [], [1, 2, 3])
    layer = "model.layers.1.self_attn"
    assert np.array_equal(found.means[f"{layer}.q_proj"], found.means[f"{layer}.v_proj"])
    assert not np.allclose(found.means[f"{layer}.q_proj"], found.means["model.layers.0.self_attn.q_proj"])


def test_logits_are_computed_for_one_token_only_and_the_model_is_left_as_it_was() -> None:
    model = qwen3().train()
    before = model(input_ids=torch.tensor([SEQUENCES[0]])).logits
    shapes: list[torch.Size] = []
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    importance.collect(model, SEQUENCES)
    handle.remove()
    assert [tuple(shape) for shape in shapes] == [(1, 1, 100)] * 3
    assert model.training
    assert torch.equal(model(input_ids=torch.tensor([SEQUENCES[0]])).logits, before)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        MueConfig(r=2, alpha=4, num_specific=3, task_type="CAUSAL_LM"),
    ],
    ids=["LoRA", "MUE"],
)
def test_layers_under_an_adapter_go_by_the_checkpoints_names(config: Any) -> None:
    """Their inputs are those of the adapted model; the adapter's own layers are no part of the file."""
    names = linear(qwen3()).keys()
    adapted: Any = get_peft_model(qwen3(), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "mue_B" in name:
                parameter.normal_(0, 0.3)
    base = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in adapted.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in ("lora_", "mue_"))
    }
    assert base.keys() == names
    expected = directly(adapted, base)
    found = importance.collect(adapted, SEQUENCES)
    assert found.means.keys() == names
    for name, mean in expected.items():
        assert np.allclose(found.means[name], mean, rtol=1e-5), name
    plain = importance.collect(qwen3(), SEQUENCES)
    later = "model.layers.1.mlp.down_proj"
    assert not np.allclose(found.means[later], plain.means[later], rtol=1e-2)


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = qwen3()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.down_proj are not finite"):
        importance.collect(model, SEQUENCES)


def test_without_tokens_there_is_no_matrix() -> None:
    with pytest.raises(BadInput, match="give calibration dialogues"):
        importance.collect(qwen3(), [])


def test_layers_without_tokens_are_reported_and_left_out() -> None:
    model = qwen3()
    model.unused = torch.nn.Linear(8, 8)
    found = importance.collect(model, SEQUENCES)
    assert found.unseen == ["unused"]
    assert "unused" not in found.means


def test_tensors_find_their_layer() -> None:
    """Three tensors cut from W_pack share its columns; row orders change none; embeddings and biases have none."""
    means = {"a.W_pack": np.arange(4.0), "lm_head": np.ones(4)}
    found = importance.Importance(means, 7, 1)
    order = np.arange(6)[::-1]
    plans = [
        TensorPlan("token_embd.weight", "model.embed_tokens.weight", (9, 4)),
        TensorPlan("output.weight", "lm_head.weight", (9, 4)),
        *(TensorPlan(f"blk.0.attn_{part}.weight", "a.W_pack.weight", (6, 4), order) for part in "qkv"),
        TensorPlan("blk.0.attn_q.bias", "a.W_pack.bias", (6,), order),
    ]
    tensors = importance.for_tensors(found, plans)
    assert tensors.keys() == {"output.weight", *(f"blk.0.attn_{part}.weight" for part in "qkv")}
    assert tensors["blk.0.attn_v.weight"].dtype == np.float32
    assert tensors["blk.0.attn_v.weight"].tolist() == [0, 1, 2, 3]
    with pytest.raises(BadInput, match="has 4 columns, the tensor 5"):
        importance.for_tensors(found, [TensorPlan("output.weight", "lm_head.weight", (9, 5))])


@pytest.mark.parametrize("quant", ["Q4_K_M", "IQ4_XS"])
def test_the_error_that_matters_falls(quant: str, tmp_path: Path) -> None:
    """On a real small model, every layer, through llama.cpp: Σ E[x²]·(ŵ-w)² is smaller with the matrix."""
    model = qwen3(256, 512, tied=True)
    model.save_pretrained(tmp_path)
    made = blueprint(hidden=256, inner=512, layers=2, heads=4, key_heads=2, head=16, vocabulary=100)
    source = tmp_path / "F32.part"
    weights = writer.Weights(Tensors([tmp_path / "model.safetensors"]), None)
    writer.write(source, "qwen3", made.metadata, made.plans, weights, "F32", lambda *_: None, sync=False)
    found = importance.collect(model, SEQUENCES)
    matrix = importance.for_tensors(found, made.plans)

    def errors(name: str, **options: Any) -> dict[str, float]:
        quantizer.quantize(source, tmp_path / name, quant, tmp_path, lambda *_: None, **options)
        made_of, exact = header.read(tmp_path / name), header.read(source)
        return {
            tensor: float((weight * (made_of.rows(tensor, 0, 512) - exact.rows(tensor, 0, 512)) ** 2).sum())
            for tensor, weight in matrix.items()
            if made_of.tensors[tensor].kind in (Kind.Q4_K, Kind.IQ4_XS)
        }

    plain, weighted = errors("plain"), errors("weighted", imatrix=matrix, recorded=found.record("test"))
    assert plain.keys() == weighted.keys() != set()
    assert all(weighted[name] < 0.9 * plain[name] for name in plain)
    assert header.read(tmp_path / "weighted").metadata["quantize.imatrix.chunks_count"] == 3
