"""What merges cost, measured on dialogues that they were not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from quantize.hugging_face import Tokenised
from quantize.live import Live, Tensors, experts, gates
from quantize.merging.factors import Merge

# A merge by task; the task "" stands for every other.
Variant = Mapping[str, Merge]


class _Sums:
    """Sums of one variant over the answers' tokens."""

    def __init__(self) -> None:
        self.loss: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.kld = 0.0
        self.same = 0

    def add(self, task: str, found: torch.Tensor, live: torch.Tensor, wanted: torch.Tensor) -> None:
        """found, live: log-probabilities [tokens, vocabulary]; wanted: the true tokens."""
        loss = -found.gather(1, wanted.unsqueeze(1)).double().sum().item()
        self.loss[task] = self.loss.get(task, 0.0) + loss
        self.tokens[task] = self.tokens.get(task, 0) + len(wanted)
        self.kld += (live.exp() * (live - found)).sum().item()
        self.same += int((found.argmax(1) == live.argmax(1)).sum())

    def figures(self) -> dict[str, Any]:
        """Means per token."""
        total = sum(self.tokens.values())
        return {
            "nll": sum(self.loss.values()) / total,
            "nll_by_task": {task: self.loss[task] / self.tokens[task] for task in sorted(self.loss)},
            "kld": self.kld / total,
            "top1": self.same / total,
        }


@torch.inference_mode()
def measure(
    live: Live, variants: Mapping[str, Variant], dialogues: Sequence[Tokenised], progress: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Figures of `base`, of every variant, and of `live`, over the assistant's tokens.

    nll: nats per token, nll_by_task; kld: KL divergence of the live model's distribution from the variant's, nats;
    top1: share of tokens where both find the same likeliest; layers: the merge's relative error of each layer's output
    on the live model's inputs, ``‖Δ(x) − B A x‖ / ‖Δ(x)‖`` over all tokens, with Δ what the live experts add.
    """
    placed = {
        name: {task: live.tensors(merge) for task, merge in variant.items()} for name, variant in variants.items()
    }
    sums = {name: _Sums() for name in ("base", *variants, "live")}
    errors = _Errors(live, placed)
    for dialogue in dialogues:
        answers = live.answers(dialogue)
        wanted = live.ids(dialogue)[0].roll(-1)[answers]

        def logs(dialogue: Tokenised = dialogue, answers: torch.Tensor = answers) -> torch.Tensor:
            # Logits of the answers only: with a large vocabulary the others would cost most of the time.
            kept = answers.nonzero().squeeze(1)
            logits = live.model(input_ids=live.ids(dialogue), use_cache=False, logits_to_keep=kept).logits[0]
            return functional.log_softmax(logits.float(), dim=-1)

        with errors.watch(dialogue.task):
            truth = logs()
        sums["live"].add(dialogue.task, truth, truth, wanted)
        for name in ("base", *variants):
            with live.merged(_of_task(placed[name], dialogue.task) if name in placed else {}):
                sums[name].add(dialogue.task, logs(), truth, wanted)
        progress()
    figures = {name: found.figures() for name, found in sums.items()}
    for name in variants:
        figures[name]["layers"] = errors.of(name)
    return figures


class _Errors:
    """Squared errors of each layer's output, gathered while the live model runs."""

    def __init__(self, live: Live, placed: Mapping[str, Mapping[str, Tensors]]) -> None:
        self._live, self._placed = live, placed
        self._handles: list[Any] = []
        self._task = ""
        self._size = dict.fromkeys(live.layers, 0.0)
        self._error = {name: dict.fromkeys(live.layers, 0.0) for name in placed}

    def watch(self, task: str) -> _Errors:
        self._task = task
        return self

    def __enter__(self) -> None:
        def watcher(name: str) -> Callable[..., None]:
            return lambda layer, inputs: self._add(name, layer, inputs[0][0])

        self._handles = [layer.register_forward_pre_hook(watcher(name)) for name, layer in self._live.layers.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, layer: Any, x: torch.Tensor) -> None:
        a, b = experts(layer)
        added = ((x @ a.T) * gates(layer, x)) @ b.T
        self._size[name] += added.double().square().sum().item()
        for variant, by_task in self._placed.items():
            a, b = _of_task(by_task, self._task)[name]
            self._error[variant][name] += (added - (x @ a.T) @ b.T).double().square().sum().item()

    def of(self, variant: str) -> dict[str, float]:
        """Relative error by layer."""
        return {name: (self._error[variant][name] / size) ** 0.5 if size else 0.0 for name, size in self._size.items()}


def _of_task(by_task: Mapping[str, Tensors], task: str) -> Tensors:
    return by_task[task] if task in by_task else by_task[""]
