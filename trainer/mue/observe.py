"""What the routers do: mean gates and their entropy by layer and task, gathered while the model runs.

with observe(model) as statistics:
    for task, batches in by_task.items():
        statistics.task = task
        for batch in batches:
            model(**batch)
statistics.figures()
gate_heat_map(statistics, Path("plots/gates.png"))
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trainer.mue.config import MueError
from trainer.mue.layer import MueLinear

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RouterStatistics:
    """Sums over tokens of the gates (without noise) and of their entropy, by task and layer.

    Set `task` before the batches that belong to it. The sums stay on the model's device, so counting does not
    wait for it; in distributed training every process counts its own tokens.
    """

    def __init__(self) -> None:
        self.task = "all"
        # task → layer → [gates' sums (N), entropy's sum, number of tokens], float64
        self._sums: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, layer: str, gates: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Counts one layer's gates [..., N] for the present task; `weights` [...] is 0 where there is padding."""
        flat = gates.double().flatten(0, -2)
        weight = flat.new_ones(len(flat)) if weights is None else weights.flatten().to(flat)
        columns = torch.cat([flat, torch.special.entr(flat).sum(-1, keepdim=True), torch.ones_like(flat[:, :1])], dim=1)
        layers = self._sums.setdefault(self.task, {})
        layers[layer] = layers.get(layer, 0) + weight @ columns

    @property
    def tasks(self) -> list[str]:
        """Tasks seen, in their order."""
        return list(self._sums)

    def usage(self, task: str | None = None) -> dict[str, torch.Tensor]:
        """Mean gates [N] of every layer, over one task's tokens or (None) all."""
        return {layer: sums[:-2] / sums[-1] for layer, sums in self._total(task).items()}

    def entropy(self, task: str | None = None) -> dict[str, float]:
        """Mean entropy of every layer's gates in nats, from 0 (one expert at a time) to ln N (all alike)."""
        return {layer: (sums[-2] / sums[-1]).item() for layer, sums in self._total(task).items()}

    def figures(self) -> dict[str, float]:
        """Figures of all layers for metrics.jsonl; empty when nothing was counted.

        router/entropy (nats) and router/entropy_relative (divided by ln N) are means over layers, router/usage_min
        and usage_max the least and most used expert of any layer. router/task_spread, for two tasks or more, is
        the total variation distance of two tasks' mean gates, averaged over pairs and layers: 0 when the routers
        do not tell tasks apart, 1 when no two tasks share an expert.
        """
        if not self._sums:
            return {}
        usage = torch.stack(list(self.usage().values()))
        entropy = list(self.entropy().values())
        mean = sum(entropy) / len(entropy)
        figures = {
            "router/entropy": mean,
            "router/entropy_relative": mean / math.log(usage.shape[1]) if usage.shape[1] > 1 else 1.0,
            "router/usage_min": usage.min().item(),
            "router/usage_max": usage.max().item(),
        }
        if len(self.tasks) > 1:
            tasks = torch.stack([torch.stack(list(self.usage(task).values())) for task in self.tasks])
            distances = [(tasks[a] - tasks[b]).abs().sum(-1) / 2 for a, b in combinations(range(len(tasks)), 2)]
            figures["router/task_spread"] = torch.stack(distances).mean().item()
        return figures

    def _total(self, task: str | None) -> dict[str, torch.Tensor]:
        chosen = [self._sums[name] for name in (self.tasks if task is None else [task])]
        total: dict[str, torch.Tensor] = {}
        for layers in chosen:
            for layer, sums in layers.items():
                total[layer] = total.get(layer, 0) + sums.cpu()
        return total


@contextmanager
def observe(model: nn.Module, adapter: str = "default") -> Iterator[RouterStatistics]:
    """Counts the gates of every forward pass of `model` inside the block; training is not disturbed.

    Tokens that the batch's `attention_mask` [batch, tokens] marks as padding are left out, as are passes with the
    adapter disabled. Raises MueError when the model has no such adapter.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MueLinear)}
    if not any(adapter in layer.mue_A for layer in layers.values()):
        raise MueError(f"The model has no MUE adapter {adapter!r}. Wrap it with a MueConfig before observing it.")
    statistics = RouterStatistics()
    mask: list[Any] = [None]

    def keep_mask(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        mask[0] = keywords.get("attention_mask")

    def count(name: str, layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if layer.disable_adapters or adapter not in layer.active_adapters or adapter not in layer.mue_A:
            return
        with torch.no_grad():
            statistics.add(name, layer.gates(inputs[0], adapter), _real_tokens(mask[0], inputs[0]))

    handles = [model.register_forward_pre_hook(keep_mask, with_kwargs=True)]
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(partial(count, name.removeprefix("base_model.model."))))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _real_tokens(mask: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The mask [batch, tokens] of x's tokens, the last ones when earlier ones are cached; None: count all."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or x.dim() != 3:
        return None
    mask = mask[:, -x.shape[1] :]
    return mask if mask.shape == x.shape[:2] else None


def gate_heat_map(statistics: RouterStatistics, path: Path) -> None:
    """Writes `gate_figure` as a PNG, making its folder. Raises MueError when nothing was counted."""
    figure = gate_figure(statistics)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def gate_figure(statistics: RouterStatistics) -> Figure:
    """Draws the mean gates: a row per layer, a column per expert, a panel per task; white is 1/N, red more.

    Raises MueError when nothing was counted.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    if not statistics.tasks:
        raise MueError("No gates were counted: run the model inside `observe` before drawing.")
    layers = list(statistics.usage())
    grids = [torch.stack(list(statistics.usage(task).values())).numpy() for task in statistics.tasks]
    rows, experts = grids[0].shape
    even, slack = 1 / experts, 0.02  # routers that hardly differ shall look so
    low, high = min(grid.min() for grid in grids), max(grid.max() for grid in grids)
    norm = TwoSlopeNorm(vmin=min(low, even - slack), vcenter=even, vmax=max(high, even + slack))
    height = min(1.4 + 0.22 * rows, 14)
    figure = Figure(figsize=(2.2 + (0.5 + 0.5 * experts) * len(grids), height), layout="constrained")
    axes = list(figure.subplots(1, len(grids), sharey=True, squeeze=False)[0])
    for axis, task, grid in zip(axes, statistics.tasks, grids, strict=True):
        axis.imshow(grid, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        axis.set_title(task, fontsize=9)
        axis.set_xticks(range(experts), [str(expert + 1) for expert in range(experts)], fontsize=8)
        axis.set_xlabel("specific expert", fontsize=8)
        if rows <= 48:
            for (row, expert), gate in np.ndenumerate(grid):
                ink = "white" if abs(norm(gate) - 0.5) > 0.4 else "black"
                axis.text(expert, row, f"{gate:.2f}", ha="center", va="center", fontsize=6, color=ink)
    every = 1 + rows // 64
    axes[0].set_yticks(range(0, rows, every), [_label(layer) for layer in layers[::every]], fontsize=7)
    figure.colorbar(axes[0].images[0], ax=axes, label="mean gate", shrink=min(1, 5 / height))
    return figure


def _label(layer: str) -> str:
    """ "model.layers.3.mlp.up_proj" → "3 up_proj"."""
    number = re.search(r"\.(\d+)\.", layer)
    return f"{number[1]} {layer.rpartition('.')[2]}" if number else layer
