"""MUE where training puts it: checkpointing, compilation, 4-bit bases, preference training with a reference."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from trainer.mue import MueConfig, MueLinear

CONFIG = partial(MueConfig, r=2, num_specific=2, task_type="CAUSAL_LM")
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
TOKENS = torch.arange(3, 15).view(2, 6)


def _base() -> Qwen3ForCausalLM:
    torch.manual_seed(3)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=0,
        )
    )


def _awake(model: nn.Module) -> Any:
    """Gives every adapter weight a value, so that experts and router matter."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "mue_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def model() -> Any:
    return _awake(get_peft_model(_base(), CONFIG())).train()


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)  # the same noise in every run
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(model: Any, use_reentrant: bool) -> None:
    plain = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.base_model.model.model.gradient_checkpointing
    recomputed = _gradients(model)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-8)


def _layer() -> MueLinear:
    torch.manual_seed(6)
    return _awake(MueLinear(nn.Linear(8, 12), "default", CONFIG()))


def test_selective_checkpointing_may_keep_the_products() -> None:
    layer, x = _layer(), torch.randn(5, 8, requires_grad=True)

    def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, keep_products)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts)):
        torch.manual_seed(7)
        gradients.append(torch.autograd.grad(run(x).square().sum(), [x, *layer.parameters()]))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_compiled_equals_eager() -> None:
    layer, x = _layer().eval(), torch.randn(2, 5, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run in (layer, compiled):
        output = run(x)
        layer.zero_grad()
        output.square().sum().backward()
        results.append([output, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == 1 + 2 + 3  # base weight and bias; A, B, route
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)
    layer.train()
    with torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))  # the noise is drawn anew, not frozen into the graph


def test_a_training_step_saves_rank_sized_activations() -> None:
    layer, x = MueLinear(nn.Linear(512, 1024), "default", MueConfig(r=8, num_specific=3)), torch.randn(64, 512)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x.requires_grad_())
    per_token = sum(size for pointer, size in saved.items() if pointer not in known) / 64 / 4
    assert output.requires_grad
    # hidden 32 before and 32 after the gates, 3 logits and 3 noise scales with them, and N-sized ones of the router
    assert 64 <= per_token <= 64 + 8 * 3


def test_four_bit_base_trains_its_experts() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(64, 128, bias=False)
    base = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(dense.state_dict())
    holder = nn.ModuleDict({"up_proj": base.to("cpu")})  # quantized when it is placed on its device
    assert base.weight.dtype == torch.uint8
    model = get_peft_model(holder, MueConfig(target_modules=["up_proj"]))  # type: ignore[arg-type]
    layer = _awake(model).base_model.model["up_proj"]
    assert isinstance(layer, MueLinear)
    assert {p.dtype for name, p in layer.named_parameters() if "mue_" in name} == {torch.float32}
    # The same experts around the dequantized weight, as an ordinary layer.
    known = nn.Linear(64, 128, bias=False)
    known.weight.data = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    twin = MueLinear(known, "default", MueConfig())
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if "mue_" in k}, strict=False)
    x = torch.randn(2, 3, 64, requires_grad=True)
    results = []
    for subject in (layer, twin):
        torch.manual_seed(8)
        output = subject(x)
        experts = [subject.get_parameter(f"mue_{part}.default.weight") for part in ("A", "B", "route", "noise")]
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *experts])])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer(x)
    assert under_autocast.dtype == layer.base_layer(x).dtype
    with torch.no_grad():
        layer.enable_adapters(False)
        assert torch.equal(layer(x), base(x))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _dpo_trainer(model: Any, folder: Path, **more: Any) -> DPOTrainer:
    pairs = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6"},
        {"prompt": "w7", "chosen": " w8 w9 w10 w11", "rejected": " w12 w13"},
    ]
    arguments = DPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=0.05,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=_tokenizer(), **more
    )


def _loss(trainer: DPOTrainer) -> float:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()  # type: ignore[union-attr]
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch).item()  # type: ignore[arg-type,union-attr]


def test_dpo_takes_the_disabled_adapter_as_its_reference(tmp_path: Path) -> None:
    trainer = _dpo_trainer(_base(), tmp_path, peft_config=CONFIG())
    assert list(trainer.model.peft_config) == ["default"]  # type: ignore[union-attr]
    assert _loss(trainer) == pytest.approx(math.log(2), abs=1e-7)
    trainer.train()
    assert _loss(trainer) < math.log(2) - 1e-3
    with trainer.model.disable_adapter(), torch.no_grad():  # type: ignore[union-attr,operator]
        assert torch.equal(trainer.model(TOKENS).logits, _base()(TOKENS).logits)  # type: ignore[misc]


def test_dpo_copies_a_trained_adapter_as_its_reference(model: Any, tmp_path: Path) -> None:
    before = copy.deepcopy({name: p for name, p in model.named_parameters() if "mue_" in name})
    trainer = _dpo_trainer(model, tmp_path)
    assert set(trainer.model.peft_config) == {"default", "ref"}  # type: ignore[union-attr]
    assert _loss(trainer) == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    assert _loss(trainer) < math.log(2) - 1e-3
    after = dict(trainer.model.named_parameters())  # type: ignore[union-attr]
    for name, parameter in before.items():
        assert torch.equal(after[name.replace(".default.", ".ref.")], parameter)
        assert not torch.equal(after[name], parameter)


def test_a_reference_has_no_noise_even_in_training_mode(model: Any) -> None:
    model.add_adapter("ref", model.peft_config["default"])
    _awake(model)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, model(TOKENS).logits)
        model.set_adapter("ref")
        assert torch.equal(model(TOKENS).logits, model(TOKENS).logits)
    assert isinstance(model, PeftModel)
