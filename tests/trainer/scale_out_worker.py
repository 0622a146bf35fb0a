"""One of the two processes that test_scale_out.py launches: what only several processes together can show.

What they found is written into the folder given as the first argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from trainer.mue import MueConfig
from trainer.origin import load_model
from trainer.recipe import load_recipe
from trainer.stages.build import stage_trainer

RATE = 0.5


def losses_without_noise(run: Path, recipe_file: Path, overrides: list[str], corpus: Path, work: Path) -> list[float]:
    """Losses of the MUE stage over the stage 3 of `run`, with the routers' noise off: freezing its weights does that.

    Every process draws noise of its own, so with it no two numbers of processes can have the same losses.
    """
    recipe = load_recipe(recipe_file, overrides)
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    model = load_model(run / "3-dfpo", recipe, tokenizer, recipe.stages.mue)
    torch.manual_seed(recipe.seed)
    trainer = stage_trainer("mue", model, tokenizer, recipe, corpus, work)
    for name, parameter in trainer.model.named_parameters():
        if "mue_noise" in name:
            parameter.requires_grad_(False)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def expert_model() -> PeftModel:
    """A small model whose experts do something: their B is not zero."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, bos_token_id=None,
    )  # fmt: skip
    model = get_peft_model(Qwen3ForCausalLM(config), MueConfig(r=2, num_specific=2, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "mue_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model  # type: ignore[return-value]


def rows() -> torch.Tensor:
    """One batch for each of two processes: [processes, sequences, tokens]."""
    return torch.randint(0, 64, (2, 3, 10), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    """The loss of a process' batch, with the noise that this process draws."""
    torch.manual_seed(rank)
    return model(input_ids=rows()[rank], labels=rows()[rank], use_cache=False).loss


def reference() -> PeftModel:
    """The unsharded model with the mean of both processes' gradients."""
    model = expert_model().train()
    (sum(loss_of(model, rank) for rank in range(2)) / 2).backward()  # type: ignore[union-attr]
    return model


def sharded(mesh: DeviceMesh, checkpointing: str = "") -> PeftModel:
    """The same model in shards, with this process' backward pass done.

    `checkpointing` "ours" is what a recipe switches on, "accelerate's" what fsdp_activation_checkpointing would.
    """
    model = expert_model().train()
    if checkpointing == "ours":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        if checkpointing == "accelerate's":
            layers[index] = layer = checkpoint_wrapper(layer, preserve_rng_state=False)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_of(model, dist.get_rank()).backward()
    return model


def difference(model: nn.Module, expected: nn.Module) -> float:
    """Largest difference of a gradient, relative to the largest expected one; all trained parameters have one."""
    known = {name: p.grad for name, p in expected.named_parameters() if p.requires_grad}
    worst = 0.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert isinstance(parameter.grad, DTensor)
        gradient = known[name.replace("_checkpoint_wrapped_module.", "")]
        assert gradient is not None
        worst = max(worst, float((parameter.grad.full_tensor() - gradient).abs().max() / gradient.abs().max()))
    return worst


def step(model: nn.Module) -> None:
    """One step of plain gradient descent."""
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE).step()
    model.eval()


def main(folder: Path, run: Path, recipe_file: Path, corpus: Path, overrides: list[str]) -> None:
    """The MUE stage under DDP, then MUE under fully_shard."""
    state = PartialState(cpu=True)
    found: dict[str, object] = {
        "losses": losses_without_noise(run, recipe_file, overrides, corpus, folder / "checkpoints")
    }
    mesh = init_device_mesh("cpu", (2,))
    expected = reference()
    for name in ("ours", "accelerate's"):
        found[f"checkpointed, {name}"] = difference(sharded(mesh, name), expected)
    model = sharded(mesh)
    found["sharded"] = difference(model, expected)
    for each in (model, expected):
        step(each)
    with torch.no_grad():
        logits = {"sharded": model(rows()[0]).logits, "whole": expected(rows()[0]).logits}
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state.is_main_process:
        model.save_pretrained(folder / "adapter", state_dict=gathered)
        torch.save(logits, folder / "logits.pt")
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]), sys.argv[5:])
