"""Least squares through the whole model, one decoder layer after the other.

Each layer is solved on the inputs that it will really get: those that come out of the layers merged before it, not
those of the live model. So what one layer loses is known to the next (RegMean++, arXiv 2508.03121). Of the calibration
dialogues only the hidden states between two decoder layers are kept, on disk when they are large.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantize.errors import BadInput
from quantize.hugging_face import Tokenised
from quantize.live import Live, experts, gates
from quantize.merging.factors import Merge
from quantize.merging.least_squares import Moments, reduce_rank, solve

# Measured in benchmarks/merging.py.
DAMPING = 1e-3
CONTEXT_WEIGHT = 0.1
_IN_MEMORY = 1 << 30  # bytes of hidden states


@torch.inference_mode()
def mean_gates(live: Live, dialogues: Sequence[Tokenised], progress: Callable[[], None]) -> dict[str, np.ndarray]:
    """Mean gates [N] of every layer of the live model over all tokens."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found = layer.gates(inputs[0]).double().flatten(0, -2).sum(0)
            sums[name] = sums[name] + found if name in sums else found

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in live.layers.items()]
    try:
        for dialogue in dialogues:
            live.model(input_ids=live.ids(dialogue), use_cache=False, logits_to_keep=1)
            progress()
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(dialogue.ids) for dialogue in dialogues)
    return {name: (total / tokens).cpu().numpy() for name, total in sums.items()}


@torch.inference_mode()
def least_squares(
    live: Live,
    dialogues: Sequence[Tokenised],
    work: Path,
    progress: Callable[[int, int], None],
    *,
    prior: Merge | None = None,
    rank: int | None = None,
    damping: float = DAMPING,
    context_weight: float = CONTEXT_WEIGHT,
) -> Merge:
    """The experts of `live` as one product of two matrices per layer, of rank (1+N)·r or `rank`.

    Parameters:
        prior: what the ridge pulls towards, a merge with the experts' own B; None: their mean gates.
        damping: the ridge's strength, relative to the mean square of the inputs.
        context_weight: weight of tokens that predict none of the assistant's, whose own weight is 1.

    Raises BadInput when the model's values are not finite.
    """
    walk = _Walk(live, dialogues, work)
    solved: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    blocks = live.decoder_layers()
    with live.merged(solved):
        walk.begin([block for block, _ in blocks])
        for number, (block, layers) in enumerate(blocks):
            for group in walk.groups(number, block, layers):
                moments = walk.moments(number, block, {name: layers[name] for name in group}, context_weight)
                for name in group:
                    known = torch.from_numpy(prior.factors(name)[0]).to(live.device) if prior else None
                    solved[name] = _solved(layers[name], name, moments, known, damping, rank)
            walk.advance(number, block)
            progress(number + 1, len(blocks))
    return Merge("least-squares", {name: (a.cpu().numpy(), b.cpu().numpy()) for name, (a, b) in solved.items()})


def _solved(
    layer: Any, name: str, moments: Moments, prior: torch.Tensor | None, damping: float, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (part.double() for part in experts(layer))
    prior = a * (moments.gates[name] / moments.weight).unsqueeze(1) if prior is None else prior.double()
    try:
        a = solve(moments.hidden[name], moments.gram, prior, damping)
    except ValueError as error:
        raise BadInput(f"{name}: {error}; the weights are damaged, train the run again.") from error
    if rank is not None:
        a, b = reduce_rank(a, b, moments.gram, rank)
    return a.float().contiguous(), b.float().contiguous()


class _Enough(Exception):
    """Ends a block's forward pass early."""


class _Walk:
    """The calibration dialogues on their way through the decoder layers."""

    def __init__(self, live: Live, dialogues: Sequence[Tokenised], work: Path) -> None:
        self._live, self._dialogues, self._work = live, dialogues, work
        ends = np.cumsum([len(dialogue.ids) for dialogue in dialogues])
        self._places = [slice(end - len(d.ids), end) for end, d in zip(ends.tolist(), dialogues, strict=True)]
        # What each decoder layer is given besides the hidden states (positions, masks): [dialogue][layer].
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._states = torch.empty(0)

    def begin(self, blocks: Sequence[Any]) -> None:
        """Runs the model once over all dialogues: the first layer's inputs and every layer's other arguments."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[torch.Tensor] = []

        def hook(_block: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not calls:
                first[:] = inputs[:1]
            calls.append((inputs[1:], named))

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
        try:
            for dialogue, place in zip(self._dialogues, self._places, strict=True):
                calls = []
                self._live.model(input_ids=self._live.ids(dialogue), use_cache=False, logits_to_keep=1)
                if not self._states.numel():
                    self._states = self._room(self._places[-1].stop, first[0].shape[-1])
                self._states[place] = first[0][0].cpu()
                self._calls.append(calls)
        finally:
            for handle in handles:
                handle.remove()

    def groups(self, number: int, block: Any, layers: dict[str, Any]) -> list[list[str]]:
        """The adapted layers of a block in the order they run; those with the same input together."""
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(_layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                if not seen or seen[-1][0] is not inputs[0]:
                    seen.append((inputs[0], []))
                seen[-1][1].append(name)

            return hook

        handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
        try:
            self._run(number, block, 0)
        finally:
            for handle in handles:
                handle.remove()
        return [names for _, names in seen]

    def moments(self, number: int, block: Any, layers: dict[str, Any], context_weight: float) -> Moments:
        """The sums of one group over all dialogues. Products in the model's precision, sums in float64."""
        moments: Moments | None = None
        weight = torch.empty(0)

        def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal moments
            x = inputs[0][0]
            weighted = x * weight.unsqueeze(1)
            if moments is None:
                moments = Moments(x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64))
            moments.add_input(x.T @ weighted, weight.sum().item())
            for name, one in layers.items():
                found = gates(one, x)
                moments.add_layer(name, ((x @ experts(one)[0].T) * found).T @ weighted, weight @ found)
            raise _Enough  # what follows in the block is not needed yet

        handle = next(iter(layers.values())).register_forward_pre_hook(hook)
        try:
            for index, dialogue in enumerate(self._dialogues):
                answers = self._live.answers(dialogue).float()
                weight = context_weight + (1 - context_weight) * answers
                with contextlib.suppress(_Enough):
                    self._run(number, block, index)
        finally:
            handle.remove()
        assert moments is not None
        return moments

    def advance(self, number: int, block: Any) -> None:
        """Replaces every dialogue's hidden states by what the block makes of them."""
        for index, place in enumerate(self._places):
            self._states[place] = self._run(number, block, index)[0].cpu()

    def _run(self, number: int, block: Any, index: int) -> torch.Tensor:
        others, named = self._calls[index][number]
        states = self._states[self._places[index]].to(self._live.device).unsqueeze(0)
        output = block(states, *others, **named)
        return output if isinstance(output, torch.Tensor) else output[0]

    def _room(self, tokens: int, width: int) -> torch.Tensor:
        if 4 * tokens * width <= _IN_MEMORY:
            return torch.empty(tokens, width)
        return torch.from_numpy(np.memmap(self._work / "hidden.states", np.float32, "w+", shape=(tokens, width)))
