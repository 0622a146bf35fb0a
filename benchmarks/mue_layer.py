"""One training step of an adapted linear layer: MUE in rank space against the published einsum and PEFT's LoRA.

    python benchmarks/mue_layer.py [--device cuda] [--dtype float32] [--tokens 256] [--rounds 9] [--json]

Every round times all variants one after the other, in a rotating order, on the same base layer and the same
input; ratios are medians of the rounds' paired ratios, so that other load on the machine falls on all alike.
A step is forward and backward, with a gradient for the input, as inside a network; the base is frozen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional

from trainer.mue import MueConfig

SHAPES = {"gate/up": (4096, 11008), "down": (11008, 4096)}
COLUMNS = ("shape", "variant", "ms", "+ms", "speed-up", "time/LoRA", "saved B/token", "times less", "peak MB")
RANK, SPECIFIC, ALPHA = 8, 3, 16.0
EXPERTS = 1 + SPECIFIC


class Published(nn.Module):
    """The released layer's computation, written from its formula: every expert's output is built.

    Shapes as in the released code: A [experts, in, r], B [experts, r, out], route [in, N], noise [in, N].
    Its float16 softmax is float32 here, which costs it nothing.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(EXPERTS, base.in_features, RANK).uniform_(-0.01, 0.01))
        self.B = nn.Parameter(torch.empty(EXPERTS, RANK, base.out_features).uniform_(-0.01, 0.01))
        self.route = nn.Linear(base.in_features, SPECIFIC, bias=False)
        self.noise = nn.Parameter(torch.empty(base.in_features, SPECIFIC).uniform_(-0.01, 0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, tokens, in] → [batch, tokens, out]."""
        result = self.base(x)
        spread = functional.softplus(x @ self.noise)
        logits = self.route(x) + torch.randn_like(spread) * spread
        gates = torch.softmax(logits, dim=-1, dtype=torch.float32).to(result.dtype)
        out = torch.einsum("bnd,edh->bneh", x, self.A)
        out = torch.einsum("bneh,ehd->bned", out, self.B) * (ALPHA / RANK)
        experts = out.clone()
        out = torch.cat([experts[:, :, :1], experts[:, :, 1:] * gates.unsqueeze(-1)], dim=2).sum(dim=2)
        result += out
        return result


def _adapted(base: nn.Linear, config: PeftConfig, trained: str) -> nn.Module:
    """PEFT's own layer around `base`, with every adapter weight away from zero."""
    holder = inject_adapter_in_model(config, nn.ModuleDict({"proj": base}))
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_(trained in name)
        if trained in name:
            nn.init.uniform_(parameter, -0.01, 0.01)
    return holder["proj"].to(base.weight.dtype)  # type: ignore[index]


def variants(base: nn.Linear) -> dict[str, nn.Module]:
    """The layers compared, all around one base layer; LoRA has the rank that MUE has in all."""
    rank = EXPERTS * RANK
    return {
        "published": Published(base).to(base.weight.device, base.weight.dtype),
        "MUE": _adapted(base, MueConfig(r=RANK, alpha=ALPHA, num_specific=SPECIFIC, target_modules=["proj"]), "mue_"),
        "LoRA": _adapted(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"]), "lora_"),
        "base": base,
    }


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, beside the parameters and the input itself."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)  # kept alive while counting, or a freed address could be counted twice
    del output
    return sum(saved.values())


def _step(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> None:
    for leaf in (x, *layer.parameters()):
        leaf.grad = None
    layer(x).backward(upstream)


def _milliseconds(action: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        action()
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    action()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def _peak_mb(action: Callable[[], None], device: torch.device) -> float | None:
    """Highest memory of one step above what is held before it, MB of 10⁶ bytes; on CUDA only."""
    if device.type != "cuda":
        return None
    action()
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 1e6


def measure(inputs: int, outputs: int, device: torch.device, tokens: int, rounds: int, dtype: torch.dtype) -> Any:
    """Figures of every variant for one shape of the base layer."""
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
    layers = variants(base)
    x = torch.randn(1, tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(1, tokens, outputs, device=device, dtype=dtype)
    steps = {name: lambda layer=layer: _step(layer, x, upstream) for name, layer in layers.items()}
    times: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for step in steps.values():  # the first step of each pays for libraries and memory
        step()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(_milliseconds(steps[name], device))

    def ratio(over: str, under: str) -> float:
        return median(a / b for a, b in zip(times[over], times[under], strict=True))

    saved = {name: saved_bytes(layer, x) / tokens for name, layer in layers.items()}
    return {
        name: {
            "ms": median(times[name]),
            "ms_range": [min(times[name]), max(times[name])],
            "added_ms": median(a - b for a, b in zip(times[name], times["base"], strict=True)),
            "speedup_over_published": ratio("published", name),
            "time_over_lora": ratio(name, "LoRA"),
            "saved_bytes_per_token": saved[name],
            "saved_less_than_published": saved["published"] / saved[name] if saved[name] else None,
            "peak_mb": _peak_mb(steps[name], device),
        }
        for name in names
    }


def run(device: str = "cpu", tokens: int | None = None, rounds: int = 9, dtype: str = "bfloat16") -> dict[str, Any]:
    """Measures both shapes; by default in bfloat16, with 1024 tokens per step on the CPU and 8192 on CUDA.

    Returns {"device", "dtype", "tokens", "rounds", "threads", "load", "shapes": {shape: {variant: figures}}}.
    ``speedup_over_published`` (larger is better) and ``time_over_lora`` (smaller is better) are paired ratios of
    whole steps, base included; ``added_ms`` is what a variant costs beside its base.
    """
    place = torch.device(device)
    tokens = tokens or (8192 if place.type == "cuda" else 1024)
    load = os.getloadavg()[0]
    shapes = {name: measure(*shape, place, tokens, rounds, getattr(torch, dtype)) for name, shape in SHAPES.items()}
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "dtype": dtype,
        "tokens": tokens,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "load": [load, os.getloadavg()[0]],
        "shapes": shapes,
    }


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of `run`'s figures, one row per shape and variant; the columns are `COLUMNS`."""

    def cell(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        (
            shape,
            name,
            f"{figure['ms']:.2f}",
            f"{figure['added_ms']:.2f}",
            f"{figure['speedup_over_published']:.2f}",
            f"{figure['time_over_lora']:.3f}",
            f"{figure['saved_bytes_per_token']:,.0f}",
            cell(figure["saved_less_than_published"], ",.0f"),
            cell(figure["peak_mb"], ",.0f"),
        )
        for shape, layers in figures["shapes"].items()
        for name, figure in layers.items()
    ]


def main() -> None:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="tokens per step (default: 1024 on the CPU, 8192 on CUDA)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = run(arguments.device, arguments.tokens, arguments.rounds, arguments.dtype)
    if arguments.json:
        print(json.dumps(figures, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in figures.items() if key != "shapes"))
    table = [COLUMNS, *rows(figures)]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    for row in table:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
