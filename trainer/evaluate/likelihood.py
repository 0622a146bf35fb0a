"""Likelihoods of chosen tokens: no logits of a whole batch, no trace left in a training that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.functional import cross_entropy

_LOGITS_PER_CHUNK = 1 << 25  # 128 MiB in float32, whatever the vocabulary


class HeldOutError(ValueError):
    """What cannot be measured; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Scored:
    """A sequence and the positions, all ≥ 1, whose tokens are scored given what stands before them."""

    ids: list[int]
    positions: list[int]


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """The model in eval mode; afterwards every module's mode and torch's random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=gpus):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def nats_of(model: Any, sequences: Sequence[Scored], device: torch.device) -> list[float]:
    """Summed negative log-likelihood of every sequence's scored tokens, in nats.

    The logits of a whole batch would fill the memory ([8192, 152k] are 5 GB), so a hook takes the hidden states on
    their way into the output layer and scores them there in chunks: in the model's own forward, where FSDP and
    ZeRO-3 have gathered the weights. The layer itself then gets one position only.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    head = model.get_output_embeddings()
    # On the right, where causal attention cannot see it, padding needs no mask.
    ids = torch.zeros(len(sequences), max(len(s.ids) for s in sequences), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
    ids = ids.to(device)
    rows = torch.tensor([row for row, s in enumerate(sequences) for _ in s.positions], device=device)
    columns = torch.tensor([position for s in sequences for position in s.positions], device=device)
    chunk = max(1, _LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    losses: list[torch.Tensor] = []
    heads: list[torch.Tensor] = []

    def score(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = given[0][rows, columns - 1]
        for part, targets in zip(hidden.split(chunk), ids[rows, columns].split(chunk), strict=True):
            losses.append(cross_entropy(layer.forward(part).float(), targets, reduction="none"))
        return (given[0][:, -1:], *given[1:])

    hooks = [
        head.register_forward_pre_hook(score),
        head.register_forward_hook(lambda layer, given, logits: heads.append(logits)),
    ]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    # equal_nan: a diverged model is measured too.
    if not torch.allclose(logits, heads[0].to(logits.dtype), rtol=0, atol=0, equal_nan=True):
        raise HeldOutError(
            f"{type(model).__name__} changes its logits after the output layer (scaling or soft-capping), so its "
            "losses cannot be measured here. Take a Qwen, Llama or Baichuan base."
        )
    per_sequence = torch.zeros(len(sequences), dtype=torch.float64)
    return per_sequence.index_add_(0, rows.cpu(), torch.cat(losses).double().cpu()).tolist()
