"""The planner's arithmetic of parameters, activations, memory, FLOPs and disk against real models and real steps."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.kernels.chunked_logprob as chunked
import trl.trainer.utils as trl_utils
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.optim.adamw import AdamW8bit
from bitsandbytes.optim.optimizer import GlobalOptimManager
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from trainer.planning import memory as planned
from trainer.planning.activations import Batch, saved
from trainer.planning.disk import disk
from trainer.planning.flops import flops_per_token, peak_flops
from trainer.planning.memory import optimizer_bytes, stage_memory, training_of
from trainer.planning.shapes import nf4_bytes, stage_parameters
from trainer.recipe import PROJECT, STAGES, Recipe, RecipeError, load_recipe
from trainer.stages.adapters import lora_config
from trainer.stages.psft import mue_config

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
QWEN3 = Qwen3Config(**SHAPE, head_dim=32)
STAGE = {"full": "cpt", "lora": "cpt", "mue": "mue"}
TARGETS = {  # module: inputs and outputs in QWEN3
    "q_proj": (128, 128),
    "k_proj": (128, 64),
    "v_proj": (128, 64),
    "o_proj": (128, 128),
    "gate_proj": (128, 384),
    "up_proj": (128, 384),
    "down_proj": (384, 128),
}


def _recipe(kind: str, *overrides: str, bf16: bool = False, checkpointing: bool = False) -> Recipe:
    settings = [
        f"bf16={str(bf16).lower()}",
        f"stages.cpt.method={'lora' if kind == 'lora' else 'full'}",
        "stages.cpt.lora_r=8",
        "stages.mue.r=8",
        *(f"stages.{name}.activation_checkpointing={str(checkpointing).lower()}" for name in STAGES),
    ]
    return load_recipe(PROJECT / "tests" / "recipes" / "tiny.yaml", [*settings, *overrides])


def _model(kind: str, config: PreTrainedConfig, recipe: Recipe, dtype: torch.dtype = torch.float32) -> Any:
    """A stage's model as TRL's trainers make it, with its fused output layer."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=recipe.attention)
    trl_utils.add_fused_lm_head(model, outputs=("entropy", "is_top1"))
    stages = recipe.stages
    adapter: Any = {"full": None, "lora": lora_config(stages.cpt), "mue": mue_config(stages.mue)}[kind]
    if adapter:
        model = get_peft_model(model, adapter)
    if recipe.stage(STAGE[kind]).activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if adapter:
            model.enable_input_require_grads()
    return model.train()


def _forward(model: Any, rows: int, length: int, recipe: Recipe, padded: bool = False, packed: bool = False) -> Any:
    ids = torch.randint(512, (rows, length))
    inputs: dict[str, torch.Tensor] = {"input_ids": ids, "labels": ids}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][-1, -3:] = 0
    if packed:
        inputs["position_ids"] = torch.arange(length // 2).repeat(2)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
        return model(**inputs, fused_lm_head=True).loss


# --- parameters


def test_full_training_counts_every_weight_of_the_model() -> None:
    parameters = stage_parameters(_recipe("full"), "cpt", QWEN3)
    attention = 128 * (128 + 64 + 64) + 128 * 128 + 2 * 32
    layer = attention + 3 * 128 * 384 + 2 * 128
    assert sum(p.count for p in parameters) == 512 * 128 + 4 * layer + 128
    assert all(p.trained for p in parameters)


@pytest.mark.parametrize("kind", ["lora", "mue"])
def test_adapter_sizes_are_the_formula_and_the_real_models(kind: str) -> None:
    recipe = _recipe(kind)
    if kind == "lora":
        expected = 4 * sum(8 * (inputs + outputs) for inputs, outputs in TARGETS.values())
    else:  # four experts of rank 8, and a router and its noise for three of them
        ffn = [TARGETS[name] for name in ("gate_proj", "up_proj", "down_proj")]
        expected = 4 * sum(4 * 8 * (inputs + outputs) + 2 * 3 * inputs for inputs, outputs in ffn)
    real = _model(kind, QWEN3, recipe)
    assert sum(p.numel() for p in real.parameters() if p.requires_grad) == expected
    assert sum(p.count for p in stage_parameters(recipe, STAGE[kind], QWEN3) if p.trained) == expected


@pytest.mark.parametrize("kind", ["full", "lora", "mue"])
def test_weights_have_the_bytes_of_the_real_model(kind: str) -> None:
    """On a GPU with bf16 frozen weights are bfloat16, and PEFT keeps the adapter over them in float32."""
    recipe = _recipe(kind, bf16=True)
    real = _model(kind, QWEN3, recipe, torch.float32 if kind == "full" else torch.bfloat16)
    parameters = stage_parameters(recipe, STAGE[kind], QWEN3, gpu=True)
    assert {p.name: p.bytes for p in parameters} == {name: p.nbytes for name, p in real.named_parameters()}


def test_four_bit_weights_have_the_bytes_bitsandbytes_gives_them() -> None:
    weight = torch.randn(384, 1024)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert state.state2 is not None
    assert nf4_bytes(weight.numel()) == packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    recipe = _recipe("lora", "stages.cpt.load_in_4bit=true", bf16=True)
    parameters = {p.name.removeprefix("base_model.model."): p for p in stage_parameters(recipe, "cpt", QWEN3)}
    assert parameters["model.layers.0.mlp.up_proj.base_layer.weight"].bytes == nf4_bytes(128 * 384)
    assert parameters["model.embed_tokens.weight"].bytes == 2 * 512 * 128


def test_a_model_without_the_targets_is_refused_with_its_layers_named() -> None:
    recipe = _recipe("full", "stages.mue.target_modules=[W_pack]")
    with pytest.raises(RecipeError, match=r"stages\.mue.*gate_proj.*stages\.mue\.target_modules"):
        stage_parameters(recipe, "mue", QWEN3)


# --- optimiser


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_state_is_exact(dtype: torch.dtype) -> None:
    recipe = _recipe("full", f"dtype={'float32' if dtype is torch.float32 else 'bfloat16'}")
    model = AutoModelForCausalLM.from_config(QWEN3, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    assert sum(optimizer_bytes(p, "adamw") for p in stage_parameters(recipe, "cpt", QWEN3)) == state


def test_8bit_state_is_exact_with_transformers_exception_for_embeddings() -> None:
    """`Trainer.create_optimizer` keeps float32 states for nn.Embedding; below 4096 values bitsandbytes does."""
    model = AutoModelForCausalLM.from_config(QWEN3)
    optimizer: Any = AdamW8bit(model.parameters())
    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(model.get_input_embeddings(), "weight", {"optim_bits": 32})
    try:
        optimizer.check_overrides()
        for group, values in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(values["params"]):
                parameter.grad = torch.zeros_like(parameter)
                optimizer.init_state(values, parameter, group, index)
    finally:
        manager.module_weight_config_triple.clear()
        manager.pid2config.clear()
    names = ("state1", "state2", "absmax1", "absmax2")
    state = sum(entry[name].nbytes for entry in optimizer.state.values() for name in names if name in entry)
    assert sum(optimizer_bytes(p, "adamw_8bit") for p in stage_parameters(_recipe("full"), "cpt", QWEN3)) == state


# --- activations and peaks


def _saved_bytes(model: Any, recipe: Recipe, batch: Batch, **options: bool) -> int:
    """Bytes that autograd keeps after a forward pass, without the weights themselves."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _forward(model, batch.rows, batch.length, recipe, **options)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "bf16", "dtype"),
    [
        ("full", False, torch.float32),
        ("full", True, torch.float32),
        ("full", True, torch.bfloat16),
        ("lora", False, torch.float32),
        ("lora", True, torch.bfloat16),
        ("mue", False, torch.float32),
        ("mue", True, torch.bfloat16),
    ],
)
def test_kept_activations(kind: str, bf16: bool, dtype: torch.dtype, checkpointing: bool) -> None:
    own = dtype is torch.bfloat16 and kind == "full"
    recipe = _recipe(kind, f"dtype={'bfloat16' if own else 'float32'}", bf16=bf16, checkpointing=checkpointing)
    _hold_against_the_model(kind, QWEN3, recipe, dtype, Batch(3, 128, masked=False), checkpointing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bf16", [False, True])
def test_attention_masks_and_weights(attention: str, bf16: bool) -> None:
    recipe = _recipe("full", f"attention={attention}", bf16=bf16)
    _hold_against_the_model("full", QWEN3, recipe, torch.float32, Batch(3, 256, masked=True), padded=True)
    _hold_against_the_model("full", QWEN3, recipe, torch.float32, Batch(1, 512, masked=True), packed=True)


@pytest.mark.parametrize("config", [Qwen2Config(**SHAPE), LlamaConfig(**SHAPE)], ids=["qwen2", "llama"])
def test_other_architectures(config: PreTrainedConfig) -> None:
    recipe = _recipe("full", bf16=True)
    _hold_against_the_model("full", config, recipe, torch.float32, Batch(3, 128, masked=False))


def _hold_against_the_model(
    kind: str,
    config: PreTrainedConfig,
    recipe: Recipe,
    dtype: torch.dtype,
    batch: Batch,
    checkpointing: bool = False,
    **options: bool,
) -> None:
    gpu = dtype is torch.bfloat16 and kind != "full"
    parameters = stage_parameters(recipe, STAGE[kind], config, gpu)
    training = training_of(recipe, STAGE[kind], parameters)
    copies, _ = planned._autocast_copies(recipe, recipe.stage(STAGE[kind]), parameters)
    expected = saved(config, batch, training, checkpointing) + (0 if checkpointing else copies)
    real = _saved_bytes(_model(kind, config, recipe, dtype), recipe, batch, **options)
    assert expected == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "mue"])
@pytest.mark.parametrize("batch", [Batch(4, 256, masked=False), Batch(1, 64, masked=False)], ids=["large", "small"])
def test_peak_of_a_real_step(
    kind: str, bf16: bool, checkpointing: bool, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward and AdamW on the processor; torch's profiler sees every allocation."""
    # TRL's tile of 4096 x 32768 logits would hide everything else at this size.
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 512)
    monkeypatch.setattr(chunked, "TOKEN_CHUNK_SIZE", 64)
    monkeypatch.setattr(planned, "_TILE_TOKENS", 64)
    monkeypatch.setattr(planned, "_TILE_VOCABULARY", 512)
    recipe = _recipe(kind, bf16=bf16, checkpointing=checkpointing)
    model = _model(kind, QWEN3, recipe)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step() -> None:
        _forward(model, batch.rows, batch.length, recipe).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    state = sum(value.nbytes for entry in optimizer.state.values() for value in entry.values())
    real = sum(p.nbytes for p in model.parameters()) + state + peak
    parameters = stage_parameters(recipe, STAGE[kind], QWEN3, gpu=False)
    memory = stage_memory(recipe, STAGE[kind], QWEN3, parameters, batch, gpu=False)
    assert memory.allocated == pytest.approx(real, rel=0.15)


def test_tile_of_trls_fused_output_layer() -> None:
    """Contract: the sizes that `_loss` assumes."""
    assert (planned._TILE_TOKENS, planned._TILE_VOCABULARY) == (
        chunked.TOKEN_CHUNK_SIZE,
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE,
    )


# --- strategies


def _memory(kind: str, strategy: str, processes: int, *overrides: str) -> planned.Memory:
    recipe = _recipe(kind, *overrides, bf16=True)
    parameters = stage_parameters(recipe, STAGE[kind], QWEN3)
    return stage_memory(recipe, STAGE[kind], QWEN3, parameters, Batch(1, 8, False), strategy, processes)


def test_mixed_precision_adamw_needs_sixteen_bytes_a_weight() -> None:
    """The rule of thumb: 4 of the weight, 4 of its gradient, 8 of its moments; ZeRO-3 splits the same sixteen."""
    parameters = stage_parameters(_recipe("full", bf16=True), "cpt", QWEN3)
    count = sum(p.count for p in parameters)
    for strategy, processes in (("single", 1), ("fsdp2", 4), ("zero3", 4)):
        standing, gradients = planned._standing(
            _recipe("full", bf16=True), _recipe("full").stages.cpt, parameters, strategy, processes
        )
        total = standing["weights"] + standing["optimizer"] + gradients
        assert total == pytest.approx(16 * count / processes, rel=1e-3)


def test_sharding_divides_and_ddp_adds_its_buckets() -> None:
    single, ddp = _memory("full", "single", 1), _memory("full", "ddp", 8)
    parameters = stage_parameters(_recipe("full", bf16=True), "cpt", QWEN3)
    assert ddp.parts["gathered"] == sum(4 * p.count for p in parameters)
    assert ddp.total - single.total == ddp.parts["gathered"]
    for strategy in ("fsdp2", "zero3"):
        totals = [_memory("full", strategy, processes).total for processes in (1, 2, 4, 8)]
        assert all(fewer > more for fewer, more in pairwise(totals))


def test_a_live_reference_is_a_second_model() -> None:
    recipe = _recipe("full", "stages.dfpo.precompute_reference=false")
    parameters = stage_parameters(recipe, "dfpo", QWEN3)
    live = stage_memory(recipe, "dfpo", QWEN3, parameters, Batch(2, 8, True))
    assert live.parts["reference"] == sum(p.bytes for p in parameters)
    lora = recipe.model_copy(
        update={
            "stages": recipe.stages.model_copy(
                update={"dfpo": recipe.stages.dfpo.model_copy(update={"method": "lora"})}
            )
        }
    )
    adapted = stage_parameters(lora, "dfpo", QWEN3)
    assert stage_memory(lora, "dfpo", QWEN3, adapted, Batch(2, 8, True)).parts["reference"] == 0


def test_gradients_wait_between_accumulated_micro_batches() -> None:
    once, twice = (_memory("full", "single", 1, f"stages.cpt.gradient_accumulation={n}") for n in (1, 2))
    assert twice.total >= once.total
    assert twice.parts["gradients"] >= once.parts["weights"]


# --- FLOPs


@pytest.mark.parametrize("kind", ["full", "lora", "mue"])
def test_flops_are_those_torch_counts(kind: str) -> None:
    recipe, rows, length = _recipe(kind, "attention=eager"), 2, 96  # torch does not count the processor's sdpa
    model = _model(kind, QWEN3, recipe)
    ids = torch.randint(512, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    parameters = list(model.parameters())
    trainable, total = (
        sum(p.numel() for p in some) for some in ([p for p in parameters if p.requires_grad], parameters)
    )
    # torch counts the attention over the whole square, without the causal half.
    expected = flops_per_token(QWEN3, trainable, total, 2 * length) * rows * length
    # Where nothing below trains, the gradients of the first layer's inputs are never made: a part of one layer in four.
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02 if kind == "full" else 0.1)


def test_an_untied_embedding_multiplies_nothing() -> None:
    untied = Qwen3Config(**{**SHAPE, "tie_word_embeddings": False}, head_dim=32)
    tied, extra = 1_000_000, 512 * 128
    assert flops_per_token(untied, tied + extra, tied + extra) == flops_per_token(QWEN3, tied, tied) == 6 * tied


def test_checkpointing_runs_the_forward_pass_again() -> None:
    plain, again = (flops_per_token(QWEN3, 1000, 1000, 64, checkpointing=on) for on in (False, True))
    assert again - plain == 2 * 1000 + 4 * 2 * 4 * 32 * 64


def test_peak_flops_of_known_gpus() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops("Some Accelerator") == 0.0


# --- disk


def test_disk_of_a_stage_is_what_its_files_take(tmp_path: Path) -> None:
    recipe = _recipe("full")
    model: Any = AutoModelForCausalLM.from_config(QWEN3)
    model.save_pretrained(tmp_path / "stage")
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    weights = (tmp_path / "stage" / "model.safetensors").stat().st_size
    parameters = {name: stage_parameters(recipe, name, QWEN3) for name in STAGES}
    plan = disk(recipe, parameters)
    assert plan.stages["cpt"] == plan.stages["dfpo"] == pytest.approx(weights, rel=0.02)
    # Two kept, one being written.
    assert plan.checkpoints == pytest.approx(3 * (weights + (tmp_path / "optimizer.pt").stat().st_size), rel=0.02)
    assert plan.total == sum(plan.stages.values()) + plan.checkpoints
    assert math.isclose(plan.stages["mue"], 4 * sum(p.count for p in parameters["mue"] if p.trained))
