"""Every architecture against transformers, or the papers' definitions, through the written file and llama.cpp."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny_models import (
    Change,
    baichuan_logits,
    divergence,
    llama_cpp_logits,
    make_baichuan,
    save_random,
    transformers_logits,
    write_gguf,
)

from quantize.architectures import TensorPlan, for_config, rotary, source_shapes
from quantize.errors import BadInput
from trainer.bases.baichuan import FROZEN_HEAD, llama_config
from trainer.bases.baichuan_weights import llama_tensors, open_tensors, write_tensors

IDS = np.random.default_rng(7).integers(0, 160, 48).tolist()
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def rope(kind: str, theta: float = 1e4, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)  # factors 1, between and 8 all occur, and 48 tokens exceed the original context
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True, **rope("default", 1e6)}),
    "qwen3 yarn": ("Qwen3", {"head_dim": 32, **rope("yarn", 1e4, attention_factor=1.7, **YARN)}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, **rope("default", 1e6)}),
    "qwen2 yarn": ("Qwen2", rope("yarn", 1e4, beta_fast=32.0, mscale=1.0, mscale_all_dim=0.5, **YARN)),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama 3": ("Llama", {"head_dim": 32, **LLAMA3}),
    "llama linear": ("Llama", rope("linear", factor=4.0)),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
}


def make(folder: Path, kind: str, **config: Any) -> Path:
    built = getattr(transformers, f"{kind}Config")(**{**SIZES, **config}, eos_token_id=2, bos_token_id=1)
    return save_random(getattr(transformers, f"{kind}ForCausalLM")(built), folder)


def assert_equal(reference: np.ndarray, found: np.ndarray) -> None:
    assert found.shape == reference.shape
    assert np.abs(found - reference).max() <= 1e-3 * reference.std()
    assert divergence(reference, found) <= 1e-6


@pytest.mark.parametrize("case", MODELS)
def test_llama_cpp_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    kind, config = MODELS[case]
    folder = make(tmp_path / "model", kind, **config)
    assert_equal(transformers_logits(folder, IDS), llama_cpp_logits(folder, tmp_path, IDS))


BAICHUAN: dict[str, dict[str, Any]] = {
    "7B": {"layers": 32, "vocabulary": 64000, "heads": 4},
    "13B": {"layers": 40, "vocabulary": 64000, "heads": 6},  # no power of two, as the 40 of the real one
    "2-7B": {"layers": 32, "vocabulary": 160, "heads": 4, "z_loss_weight": 0},
    "2-13B": {"layers": 40, "vocabulary": 160, "heads": 6, "z_loss_weight": 0},
}


@pytest.mark.parametrize("case", BAICHUAN)
def test_llama_cpp_computes_what_baichuans_papers_say(case: str, tmp_path: Path) -> None:
    tensors = make_baichuan(tmp_path / "model", **BAICHUAN[case])
    options = {"alibi": case.endswith("13B"), "norm_head": case.startswith("2")}
    reference = baichuan_logits(tensors, IDS, heads=BAICHUAN[case]["heads"], **options)
    assert_equal(reference, llama_cpp_logits(tmp_path / "model", tmp_path, IDS))


def test_a_baichuan2_that_the_trainer_converted_answers_alike(tmp_path: Path) -> None:
    tensors = make_baichuan(tmp_path / "own", layers=32, vocabulary=160, heads=4, z_loss_weight=0)
    config = llama_config(tmp_path / "own")
    (tmp_path / "llama").mkdir()
    config.save_pretrained(tmp_path / "llama")
    stored = open_tensors(tmp_path / "own")
    wanted = llama_tensors(config, stored, tmp_path / "own")
    write_tensors(tmp_path / "llama", wanted, stored, bool(getattr(config, FROZEN_HEAD)), None)
    reference = baichuan_logits(tensors, IDS, heads=4, alibi=False, norm_head=True)
    assert_equal(reference, llama_cpp_logits(tmp_path / "llama", tmp_path, IDS))


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_sixteen_bits_stay_the_same_sixteen_bits(stem: str, tmp_path: Path) -> None:
    """A bfloat16 Llama as BF16: matrices bit for bit, rows turned as upstream turns them, the rest float32."""
    folder = make(tmp_path / "model", "Llama", attention_bias=True, **LLAMA3)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    write = save_file if stem.endswith("safetensors") else torch.save
    write(tensors, folder / stem)
    written = {tensor.name: tensor for tensor in GGUFReader(write_gguf(folder, tmp_path, "BF16")).tensors}
    for name, heads in (("q", 4), ("k", 2)):
        weight = tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
        turned = weight.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(weight.shape)
        found = written[f"blk.1.attn_{name}.weight"].data.view(np.uint16)
        np.testing.assert_array_equal(found, turned.view(torch.uint16).numpy())
    narrow = {name for name, tensor in written.items() if tensor.tensor_type.name == "F32"}
    assert narrow == {
        name for name in written if "norm" in name or name.endswith("bias") or name == "rope_freqs.weight"
    }
    assert {written[name].tensor_type.name for name in written if name not in narrow} == {"BF16"}


def unturned(plan: TensorPlan) -> TensorPlan:
    """The rows in the checkpoint's order; of W_pack still the right third."""
    return plan if plan.order is None else replace(plan, order=np.sort(plan.order))


LEFT_OUT: dict[str, tuple[str, Change]] = {
    "llama tied, rows of q and k": ("llama tied", lambda plans: [unturned(plan) for plan in plans]),
    "llama biases, rows of their biases": (
        "llama biases",
        lambda plans: [p if p.is_matrix else unturned(p) for p in plans],
    ),
    "qwen2, biases": ("qwen2", lambda plans: [p for p in plans if not p.name.endswith("bias")]),
    "llama 3, factors": ("llama 3", lambda plans: [p for p in plans if p.name != "rope_freqs.weight"]),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_would_show(case: str, tmp_path: Path) -> None:
    """llama.cpp loads all of these without complaint."""
    name, change = LEFT_OUT[case]
    kind, config = MODELS[name]
    folder = make(tmp_path / "model", kind, **config)
    assert divergence(transformers_logits(folder, IDS), llama_cpp_logits(folder, tmp_path, IDS, change)) > 1e-3


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("2-7B", lambda plans: [unturned(plan) for plan in plans]),
        ("2-13B", lambda plans: [replace(plan, unit_rows=False) for plan in plans]),
    ],
    ids=["rows of q and k", "normalised head"],
)
def test_what_is_left_out_of_baichuan_would_show(case: str, change: Change, tmp_path: Path) -> None:
    tensors = make_baichuan(tmp_path / "model", **BAICHUAN[case])
    reference = baichuan_logits(tensors, IDS, heads=BAICHUAN[case]["heads"], alibi=case == "2-13B", norm_head=True)
    assert divergence(reference, llama_cpp_logits(tmp_path / "model", tmp_path, IDS, change)) > 1e-3


def baichuan_config(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["BaichuanForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 32,
        "num_attention_heads": 4,
        "vocab_size": 125696,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "model_max_length": 4096,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    config = {
        "architectures": [f"{kind}ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "head_dim": 16,
        "rope_theta": 1e6,
    }
    return {key: value for key, value in (SIZES | config | changes).items() if value is not None}


def both(config: dict[str, Any]) -> tuple[dict[str, Any], Sequence[TensorPlan]]:
    architecture = for_config(config)
    return architecture.metadata(config), architecture.plan(config)


@pytest.mark.parametrize(("vocabulary", "divided"), [(64000, False), (125696, True)])
def test_the_vocabulary_tells_baichuan_1_from_2(vocabulary: int, divided: bool) -> None:
    _, plans = both(baichuan_config(vocab_size=vocabulary))
    assert [plan.name for plan in plans if plan.unit_rows] == (["output.weight"] if divided else [])


def test_w_pack_is_read_once() -> None:
    _, plans = both(baichuan_config())
    packed = [plan for plan in plans if plan.source == "model.layers.3.self_attn.W_pack.weight"]
    assert [plan.name for plan in packed] == [f"blk.3.attn_{part}.weight" for part in "qkv"]
    assert source_shapes(plans)[packed[0].source] == (192, 64)
    rows = np.arange(192)
    read = np.concatenate([rows[plan.source_rows(0, 40)] for plan in packed])
    assert (read == np.concatenate([plan.order[:40] for plan in packed if plan.order is not None])).all()
    assert packed[2].source_rows(8, 24) == slice(136, 152)  # values lie together and can be copied as they are


def test_rotation_order_is_ggmls() -> None:
    """Row 2i of a head is transformers' row i, row 2i + 1 its row i + head/2."""
    assert rotary.interleaved(2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_theta": None, **rope("yarn", 5e5, **YARN)},
    ],
    ids=["type", "rope_type", "transformers 5"],
)
def test_three_ways_to_write_a_rotation(old: dict[str, Any]) -> None:
    metadata, _ = both(config_of("Qwen2", **old))
    assert {key: value for key, value in metadata.items() if ".rope." in key} == {
        "qwen2.rope.freq_base": 5e5,
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }


def test_head_size_is_always_written() -> None:
    metadata, _ = both(config_of("Qwen3", head_dim=24))
    assert metadata["qwen3.attention.key_length"] == metadata["qwen3.attention.value_length"] == 24
    metadata, _ = both(config_of("Llama", head_dim=None))
    assert metadata["llama.attention.key_length"] == metadata["llama.rope.dimension_count"] == 16


def test_a_window_that_is_switched_off_is_no_window() -> None:
    both(config_of("Qwen2", use_sliding_window=False, sliding_window=32, max_window_layers=0))
    both(config_of("Qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=2))
    both(config_of("Qwen2", use_sliding_window=True, sliding_window=512, max_window_layers=0))
    both(config_of("Qwen3", layer_types=["full_attention"] * 2, sliding_window=4096))


def test_a_converted_baichuan_is_a_llama() -> None:
    plain, frozen = (both(config_of("Llama", **key))[1] for key in ({}, {"pediatricsgpt_frozen_head": True}))
    assert [(p.name, p.shape, p.unit_rows) for p in plain] == [(p.name, p.shape, p.unit_rows) for p in frozen]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": (config_of("Gemma3"), "supported: Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM"),
    "no architecture": ({"architectures": []}, "supported: Qwen3"),
    "quantized": (config_of("Qwen2", quantization_config={"bits": 4}), "quantized already"),
    "size missing": (config_of("Qwen2", hidden_size=None), "`hidden_size`"),
    "size no number": (config_of("Qwen2", num_hidden_layers="2"), "`num_hidden_layers`"),
    "size not whole": (config_of("Llama", intermediate_size=96.5), "`intermediate_size`"),
    "too many layers": (config_of("Llama", num_hidden_layers=10**6), "up to 512"),
    "norm not finite": (config_of("Llama", rms_norm_eps=float("inf")), "`rms_norm_eps`"),
    "heads do not divide": (config_of("Llama", num_attention_heads=5, head_dim=None), "no multiple"),
    "groups do not divide": (config_of("Llama", num_key_value_heads=3), "3 key-value heads"),
    "qwen2 with wide heads": (config_of("Qwen2", head_dim=32), "add up"),
    "qwen3 without head size": (config_of("Qwen3", head_dim=None), "`head_dim`"),
    "qwen3 with biases": (config_of("Qwen3", attention_bias=True), "attention_bias=True"),
    "activation": (config_of("Llama", hidden_act="gelu"), "hidden_act='gelu'"),
    "window": (config_of("Mistral", sliding_window=64), "sliding-window"),
    "window of some layers": (config_of("Qwen2", layer_types=["full_attention", "sliding_attention"]), "sliding"),
    "window by its first layer": (
        config_of("Qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
        "sliding-window",
    ),
    "no base": (config_of("Qwen2", rope_theta=None), "rope_theta"),
    "dynamic rotation": (config_of("Llama", rope_scaling={"type": "dynamic", "factor": 2}), "'dynamic'"),
    "llama3 rotation of qwen": (config_of("Qwen2", **LLAMA3), "'llama3'"),
    "rotation no object": (config_of("Llama", rope_scaling=[1]), "must be an object"),
    "partial rotation": (config_of("Llama", **rope("default", partial_rotary_factor=0.5)), "part of each head"),
    "factor missing": (config_of("Llama", rope_scaling={"type": "linear"}), "`factor`"),
    "factor below 1": (config_of("Llama", rope_scaling={"type": "linear", "factor": 0.5}), "shorten"),
    "yarn with other betas": (config_of("Qwen2", **rope("yarn", beta_fast=16, **YARN)), "beta_fast=16"),
    "yarn not truncated": (config_of("Llama", **rope("yarn", truncate=False, **YARN)), "truncate"),
    "llama3 in the wrong order": (
        config_of(
            "Llama",
            **rope("llama3", factor=8, low_freq_factor=4, high_freq_factor=1, original_max_position_embeddings=32),
        ),
        "must exceed",
    ),
    "baichuan of 2 layers": (baichuan_config(num_hidden_layers=2), "2 layers"),
    "baichuan of unknown head": (baichuan_config(vocab_size=64002), "z_loss_weight"),
    "baichuan 7B with ALiBi": (baichuan_config(position_embedding="ALIBI"), "ALIBI"),
    "baichuan 7B without length": (baichuan_config(max_position_embeddings=None), "max_position_embeddings"),
    "baichuan 13B without length": (
        baichuan_config(num_hidden_layers=40, model_max_length=None),
        "model_max_length",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    config, words = REFUSED[case]
    with pytest.raises(BadInput) as caught:
        both(json.loads(json.dumps(config)))
    assert words in str(caught.value)


PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Qwen3-0.6B": (
        596_049_920,
        config_of(
            "Qwen3",
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        ),
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        config_of(
            "Qwen2",
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            head_dim=None,
            use_sliding_window=False,
            sliding_window=131072,
            max_window_layers=28,
        ),
    ),
    "Llama-3.1-8B": (
        8_030_261_248,
        config_of(
            "Llama",
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
        ),
    ),
    "Baichuan2-7B": (
        7_505_973_248,
        baichuan_config(hidden_size=4096, intermediate_size=11008, num_attention_heads=32),
    ),
    "Baichuan2-13B": (
        13_896_668_160,
        baichuan_config(
            hidden_size=5120,
            intermediate_size=13696,
            num_attention_heads=40,
            num_hidden_layers=40,
            max_position_embeddings=None,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    parameters, config = PUBLISHED[name]
    _, plans = both(config)
    assert sum(math.prod(plan.shape) for plan in plans) == parameters


WEIRD = (None, -1, 0, 0.5, 1e300, 10**30, 2**31 - 1, float("nan"), True, "x", "", [], [1], {}, {"x": 1})


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2", "Llama", "Baichuan"])
def test_any_value_anywhere_is_computed_or_refused(kind: str) -> None:
    """Nothing in a config.json may end in a traceback, or in arrays without bound."""
    config = baichuan_config() if kind == "Baichuan" else config_of(kind, rope_theta=None, **LLAMA3)
    keys = {*config, "rope_parameters", "rope_scaling", "layer_types", "sliding_window", "tie_word_embeddings"}
    keys |= {"use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "position_embedding"}
    broken = [config | {key: value} for key in keys for value in WEIRD]
    for scaling in (LLAMA3, rope("yarn", attention_factor=1.0, mscale=1.0, mscale_all_dim=1.0, **YARN)):
        settings = scaling["rope_parameters"]
        broken += [config | {"rope_parameters": settings | {key: value}} for key in settings for value in WEIRD]
    refused = 0
    for case in broken:
        try:
            metadata, plans = both(case)
        except BadInput:
            refused += 1
            continue
        assert all(isinstance(value, str | int) or abs(value) < 3e38 for value in metadata.values())  # type: ignore[arg-type]
        assert all(0 < rows < 2**31 for plan in plans for rows in plan.shape)
    assert 0 < refused < len(broken)
