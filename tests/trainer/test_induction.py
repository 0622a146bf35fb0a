"""A freshly initialised model with induction heads already repeats what it has seen; a random one does not."""

from __future__ import annotations

import random

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trainer.induction import write_induction_heads

LENGTH, VOCABULARY = 30, 1000


def _model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=3,
            intermediate_size=256,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    ).eval()


def _repeated_correctly(model: Qwen3ForCausalLM) -> float:
    rng = random.Random(1)
    parts = [rng.sample(range(3, VOCABULARY), LENGTH) for _ in range(8)]
    tokens = torch.tensor([[1, *part, *part] for part in parts])
    with torch.no_grad():
        guesses = model(tokens).logits[:, LENGTH + 1 : -1].argmax(-1)
    return (guesses == tokens[:, LENGTH + 2 :]).float().mean().item()


def test_it_copies_from_the_first_step() -> None:
    model = _model()
    assert _repeated_correctly(model) < 0.05
    write_induction_heads(model, seed=0)
    assert _repeated_correctly(model) > 0.8
