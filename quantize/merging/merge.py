"""Merges the experts of a run and measures what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from quantize.errors import BadInput
from quantize.hugging_face import Tokenised
from quantize.live import Live
from quantize.merging.collect import least_squares, mean_gates
from quantize.merging.constants import constant_gates
from quantize.merging.experts import Adapter
from quantize.merging.factors import Merge
from quantize.merging.measure import Variant, measure
from quantize.progress import Progress, labelled
from quantize.run_folder import Dialogue

_MIN_GAIN = 1e-3  # nats; a share of a smaller gain means nothing
PER_TASK = "per task"
_MOST_TASKS = 8
# Floating-point operations: about half an hour of a processor with two cores; a GPU does fifty times as many. A large
# model is fitted and measured on fewer dialogues, but on so many tokens at least (benchmarks/README.md: a quarter of
# 43,000 tokens costs 0.001 of the gain kept).
_WORK, _GPU = 2e14, 50
_LEAST_FITTED, _LEAST_MEASURED = 8192, 2048


@dataclass(frozen=True)
class Merged:
    """The merge for the one file, one merge per task to stand in its place, and the report on all of them."""

    merge: Merge
    tasks: dict[str, Merge]
    report: dict[str, Any] | None


def merge_experts(
    live: Live,
    adapter: Adapter,
    calibration: Sequence[Dialogue],
    held_out: Sequence[Dialogue],
    method: str,
    work: Path,
    progress: Progress,
    *,
    rank: int | None = None,
    tasks: bool = True,
) -> Merged:
    """Merges by `method` (one of METHODS) on `calibration` and measures all methods on `held_out`.

    Without held-out dialogues every third calibration dialogue is kept out of the fit. Without any dialogue only
    `uniform` and `universal` are possible, and there is no report.

    Parameters:
        work: folder for hidden states too large for memory.
        rank: of the product of matrices, at most (1+N)·r (None); only for least squares.
        tasks: also make one merge per task (least squares only).

    Raises BadInput.
    """
    if rank is not None and method != "least-squares":
        raise BadInput(f"--rank needs --merge least-squares: {method} has no measure of what a smaller rank loses.")
    if rank is not None and rank < 1:
        raise BadInput("--rank must be 1 or more.")
    if not calibration:
        if method not in ("uniform", "universal"):
            raise BadInput(
                f"Merging by {method} needs dialogues; give some with --calibration, or merge with --merge uniform."
            )
        return Merged(constant_gates(adapter, method), {}, None)
    fitted, measured, measured_on = split(live, calibration, held_out)
    if tasks and len({dialogue.task for dialogue in fitted}) > _MOST_TASKS:
        raise BadInput(
            f"The calibration dialogues name more than {_MOST_TASKS} tasks, and each would get an adapter of its own; "
            "name few in their `task`, or leave out --task-adapters."
        )
    with live.on_fastest_device():
        budget = _tokens(live)
        fitted, measured = thinned(fitted, max(_LEAST_FITTED, budget)), thinned(measured, max(_LEAST_MEASURED, budget))
        variants: dict[str, Variant] = {
            "universal": {"": constant_gates(adapter, "universal")},
            "uniform": {"": constant_gates(adapter, "uniform")},
            "usage": {"": _usage(live, adapter, fitted, progress)},
        }
        by_task: dict[str, Merge] = {}
        if method == "least-squares":
            merge, by_task = _fit(live, fitted, work, progress, rank=rank, tasks=tasks)
            variants[method] = {"": merge}
            if by_task:
                variants[PER_TASK] = {"": merge, **by_task}
        figures = measure(live, variants, measured, _counter(progress, "Measuring the merges", len(measured)))
    report = merge_report(figures, method, measured, measured_on, fitted)
    return Merged(variants[method][""], by_task, report)


def thinned(dialogues: list[Tokenised], tokens: int) -> list[Tokenised]:
    """Evenly spread dialogues of every task that together have about as many tokens; all when there are not more."""
    total = sum(len(dialogue.ids) for dialogue in dialogues)
    if total <= tokens:
        return dialogues
    count = max(1, round(len(dialogues) * tokens / total))
    by_task = sorted(dialogues, key=lambda dialogue: dialogue.task)
    return [by_task[number * len(by_task) // count] for number in range(count)]


def _tokens(live: Live) -> int:
    """How many tokens a fit, or the measurement of all merges, may run over: some eight forward passes over each."""
    parameters = sum(parameter.numel() for parameter in live.model.parameters())
    speed = _GPU if live.device.type == "cuda" else 1
    return int(speed * _WORK / (16 * parameters))


def merge_report(
    figures: dict[str, dict[str, Any]],
    method: str,
    measured: Sequence[Tokenised],
    measured_on: str,
    fitted: Sequence[Tokenised],
) -> dict[str, Any]:
    """Figures as the model card and the GGUF hold them; losses are nats per assistant token."""
    table = table_of(figures)
    by_name = {row["name"]: row for row in table}
    return {
        "method": method,
        "nll_base": by_name["base"]["nll"],
        "nll_merged": by_name[method]["nll"],
        "nll_live": by_name["live"]["nll"],
        "gain": by_name["base"]["nll"] - by_name["live"]["nll"],
        "kept": by_name[method]["kept"],
        "kept_per_task": by_name[PER_TASK]["kept"] if PER_TASK in by_name else None,
        "measured_on": measured_on,
        "dialogues": len(measured),
        "tokens": sum(sum(dialogue.assistant[1:]) for dialogue in measured),
        "calibration_dialogues": len(fitted),
        "calibration_tokens": sum(len(dialogue.ids) for dialogue in fitted),
        "table": table,
    }


def table_of(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What `measure` found as a list, with `name`, `layer_error` (mean over layers) and `kept`.

    `kept` is the share of the experts' gain over the base that a merge keeps (it may be negative), None when they
    gained next to nothing.
    """
    base, gain = figures["base"]["nll"], figures["base"]["nll"] - figures["live"]["nll"]
    return [
        {
            "name": name,
            **found,
            "kept": (base - found["nll"]) / gain if gain > _MIN_GAIN else None,
            "layer_error": fmean(found["layers"].values()) if "layers" in found else None,
        }
        for name, found in figures.items()
    ]


def split(
    live: Live, calibration: Sequence[Dialogue], held_out: Sequence[Dialogue]
) -> tuple[list[Tokenised], list[Tokenised], str]:
    """What is fitted on, what is measured on, and the latter in words."""
    fitted = live.tokenise(list(calibration))
    if held_out:
        return fitted, live.tokenise(list(held_out)), "held-out dialogues"
    if len(fitted) < 3:
        return fitted, fitted, "calibration dialogues, the same that the merge was fitted on"
    # By task first: where three tasks take turns, every third dialogue would be of the same one.
    fitted.sort(key=lambda dialogue: dialogue.task)
    rest = [dialogue for number, dialogue in enumerate(fitted) if number % 3]
    return rest, fitted[::3], "calibration dialogues kept out of the fit (every third)"


def _usage(live: Live, adapter: Adapter, fitted: list[Tokenised], progress: Progress) -> Merge:
    gates = mean_gates(live, fitted, _counter(progress, "Measuring the gates", len(fitted)))
    if missing := sorted(set(gates) ^ set(adapter.layers)):
        raise BadInput(f"Adapter file and model disagree about the layer {missing[0]}; train the stage mue again.")
    return constant_gates(adapter, "usage", gates)


def _fit(
    live: Live, fitted: list[Tokenised], work: Path, progress: Progress, *, rank: int | None, tasks: bool
) -> tuple[Merge, dict[str, Merge]]:
    """One merge on everything, and one per task, pulled towards the first where a task's dialogues are few."""

    def solve(dialogues: list[Tokenised], label: str, prior: Merge | None = None) -> Merge:
        return least_squares(live, dialogues, work, labelled(progress, label), prior=prior, rank=rank)

    merge = solve(fitted, "Merging the experts")
    names = sorted({dialogue.task for dialogue in fitted} - {""}) if tasks else []
    by_task = {name: [dialogue for dialogue in fitted if dialogue.task == name] for name in names}
    return merge, {
        name: solve(dialogues, f"Merging the experts for {name}", merge if rank is None else None)
        for name, dialogues in by_task.items()
    }


def _counter(progress: Progress, label: str, total: int) -> Callable[[], None]:
    done = iter(range(1, total + 1))
    return lambda: progress(label, next(done), total)
