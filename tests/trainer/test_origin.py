"""Existing bases: what they are loaded as, LoRA and QLoRA through all four stages, and bases that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trainer.corpus.build import build_corpus
from trainer.origin import load_model, make_tokenizer, new_model, on_gpu
from trainer.recipe import PROJECT, Recipe, RecipeError, TokenizerRecipe, load_recipe
from trainer.run import Run
from trainer.stages.build import stage_trainer
from trainer.tokenizer import train_tokenizer

END = 2  # <|im_end|>
TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"
LORA = """
name: lora
base: {base}
device: cpu
bf16: false
loggers: []
corpus:
  {{cards: tui/library/cards, texts: 8, selections: 4, dialogues: 8, preferences: 8, task_dialogues: 8, held_out: 4}}
stages:
  cpt: {{method: lora, lora_r: 4, lora_alpha: 8, batch_size: 4, max_length: 512, learning_rate: 1.0e-2, log_every: 1}}
  sft: {{evaluate_every: 1}}
  dfpo: {{}}
  mue: {{r: 2}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and a tokenizer, as a hub would give it."""
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    recipe = load_recipe(TINY)
    texts = [path.read_text(encoding="utf-8") for path in sorted((PROJECT / "tui/library/cards").glob("f*.md"))]
    tokenizer = train_tokenizer(texts, TokenizerRecipe(vocab_size=1200), 2048)
    model = new_model(recipe, tokenizer)
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")  # as base models have it
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def _recipe(base: Path, folder: Path, *changes: str) -> Recipe:
    file = folder / "lora.yaml"
    file.write_text(LORA.format(base=base), encoding="utf-8")
    return load_recipe(file, changes)


@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_lora_stages_hand_on_dense_models(base: Path, tmp_path: Path, four_bit: bool) -> None:
    recipe = _recipe(base, tmp_path, f"stages.cpt.load_in_4bit={str(four_bit).lower()}")
    run = Run(recipe, tmp_path / "run", tmp_path / "corpus", Console(quiet=True))
    run.execute()
    before = AutoModelForCausalLM.from_pretrained(base)
    for stage in ("1-cpt", "2-sft", "3-dfpo"):
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / stage)
        changed = [name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])]
        assert len(changed) == 2 * 7, f"{stage}: the LoRA of seven projections in two layers is merged"
        assert after.dtype == torch.float32
        assert after.generation_config.eos_token_id == after.config.eos_token_id == END, "ours, not the base's"
        before = after
    PeftModel.from_pretrained(before, str(tmp_path / "run" / "4-mue"))
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert list(record["held_out"]) == ["start", "cpt", "sft", "dfpo", "mue"]
    assert record["held_out"]["sft"]["assistant_loss"] < record["held_out"]["start"]["assistant_loss"]


def test_an_evaluation_does_not_cost_4_bit_layers_their_gradients(base: Path, tmp_path: Path) -> None:
    """bitsandbytes repacks weights at the first evaluation on a CPU (origin.py); the gradient must stay what it was."""
    recipe = _recipe(base, tmp_path, "stages.cpt.load_in_4bit=true", "corpus.texts=4")
    build_corpus(recipe, tmp_path / "corpus")
    tokenizer = make_tokenizer(recipe, [])
    model = load_model(base, recipe, tokenizer, recipe.stages.cpt)
    trainer = stage_trainer("cpt", model, tokenizer, recipe, tmp_path / "corpus", tmp_path / "checkpoints")
    batch = next(iter(trainer.get_train_dataloader()))

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    before = gradients()
    with torch.no_grad():
        trainer.model.eval()(input_ids=batch["input_ids"], labels=batch["input_ids"])
    after = gradients()
    assert before.keys() == after.keys()
    assert len(before) == 2 * 7 * 2
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, msg=name)


def test_the_base_gets_our_template_and_ends_its_turns(base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base, tmp_path)
    tokenizer = make_tokenizer(recipe, [])
    assert "{% generation %}" in str(tokenizer.chat_template)
    model = load_model(base, recipe, tokenizer)
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


class _Longer(PreTrainedTokenizerFast):
    def __len__(self) -> int:
        return 99_999


def test_bases_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    recipe = _recipe(base, tmp_path)
    longer: Any = _Longer(tokenizer_file=str(base / "tokenizer.json"), eos_token="<|im_end|>")
    with pytest.raises(RecipeError, match=r"99999 tokens.*do not belong together"):
        load_model(base, recipe, longer)
    with pytest.raises(RecipeError, match="hf download"):
        make_tokenizer(recipe.model_copy(update={"base": str(tmp_path / "none")}), [])
    text = (base / "tokenizer.json").read_text(encoding="utf-8")
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|begin|>"), encoding="utf-8")
    with pytest.raises(RecipeError, match="no chat tokens"):
        make_tokenizer(recipe.model_copy(update={"base": str(tmp_path)}), [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match="nvidia-smi"):
        on_gpu(load_recipe(Path("qwen3-0.6b")))
