"""The SFT regulariser of DFPO against the paper code's formula, on answers of unequal length."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from trainer.corpus.record import Message, Record, Source
from trainer.origin import new_model
from trainer.recipe import PROJECT, TokenizerRecipe, load_recipe
from trainer.stages.dfpo import dfpo_trainer, sft_regulariser
from trainer.tokenizer import train_tokenizer


def test_each_sample_counts_the_same() -> None:
    log_probs = torch.tensor([[-1.0, -3.0, 9.0, 9.0], [-2.0, -4.0, -6.0, -8.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    loss = sft_regulariser(log_probs, mask)
    assert loss.item() == pytest.approx((2.0 + 5.0) / 2)  # the token mean would be 4.0
    loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-0.25, -0.25, 0, 0], [-0.125] * 4]))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["stages.dfpo.precompute_reference=false"],
        ["stages.dfpo.method=lora"],
        ["stages.dfpo.method=lora", "stages.dfpo.precompute_reference=false"],
    ],
    ids=["precomputed", "a second copy", "lora, precomputed", "lora switched off"],
)
def test_one_step_of_the_real_trainer_has_the_papers_loss(tmp_path: Path, changes: list[str]) -> None:
    """Before the first update policy and reference agree: the loss is log 2 plus μ times the regulariser."""
    recipe = load_recipe(PROJECT / "tests" / "recipes" / "tiny.yaml", ["loggers=[]", *changes])
    pairs = [_pair(1, "甲。\n", "乙。\n"), _pair(2, "甲乙丙丁甲乙丙丁。\n", "丙。\n")]
    texts = [m.content for pair in pairs for m in (*pair.prompt, *pair.chosen, *pair.rejected)]  # type: ignore[misc]
    tokenizer = train_tokenizer(texts, TokenizerRecipe(vocab_size=400), 128)
    model = new_model(recipe, tokenizer)
    expected = []
    for pair in pairs:
        prompt = [message.model_dump() for message in pair.prompt or ()]
        whole = prompt + [message.model_dump() for message in pair.chosen or ()]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
        ids = torch.tensor([tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]])
        with torch.no_grad():
            log_probs = model.eval()(ids).logits[0, start - 1 : -1].log_softmax(-1)
        expected.append(-log_probs.gather(1, ids[0, start:, None]).mean().item())
    trainer = dfpo_trainer(model, tokenizer, recipe, pairs, [], tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    weight = recipe.stages.dfpo.sft_weight
    assert loss.item() == pytest.approx(math.log(2) + weight * sum(expected) / 2, abs=1e-4)


def _pair(number: int, chosen: str, rejected: str) -> Record:
    return Record(
        id=str(number),
        kind="preference",
        task="knowledge",
        source=Source(name="test", licence="Apache-2.0", reference="none"),
        age_group="",
        split="train",
        group="g",
        prompt=(Message(role="system", content="系统"), Message(role="user", content="问题甲乙")),
        chosen=(Message(role="assistant", content=chosen),),
        rejected=(Message(role="assistant", content=rejected),),
    )


def test_trl_still_computes_the_loss_where_dfpo_hooks_in() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert list(inspect.signature(DPOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"]
    assert "outputs.log_probs[:, -seq_len:]" in source
