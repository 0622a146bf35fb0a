"""What every stage did to the held-out figures, from run.json: the forgetting table and its notes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from trainer.recipe import STAGES
from trainer.reporting.formats import markdown, number
from trainer.reporting.plots import LABELS

HeldOut = Mapping[str, Mapping[str, float]]  # {"start" or a stage: {figure: value}}
FORGETTING_LIMIT = 0.10  # a rise of general perplexity that is pointed out
# Figures of which more is better; of the others less is.
_MORE_IS_BETTER = {"preference_accuracy", "preference_margin", "preference_log_odds"}
_WORTH_MARKING = 0.01
PURPOSES = {
    "cpt": "learns pediatric text",
    "sft": "learns to answer",
    "dfpo": "prefers humane, careful answers",
    "mue": "sharpens each task",
}


def held_out_table(held_out: HeldOut) -> str:
    """Every held-out figure at the start and after each stage, with its change against the column before."""
    columns = [name for name in LABELS if held_out.get(name)]
    figures = sorted(dict.fromkeys(name for column in columns for name in held_out[column]), key=_order)
    header = ["figure", *("at the start" if name == "start" else f"after {LABELS[name]}" for name in columns)]
    lines = []
    for figure in figures:
        cells, before = [], None
        for column in columns:
            value = held_out[column].get(figure)
            cells.append(_with_change(figure, before, value) if value is not None else "–")
            before = value if value is not None else before
        lines.append([f"`{figure}`", *cells])
    return markdown(header, lines)


def forgetting_notes(held_out: HeldOut) -> list[str]:
    """A sentence for every stage that raised general perplexity by more than a tenth, and for the run as a whole."""
    figures = {name: held_out.get(name) or {} for name in LABELS}
    known = [(name, values["general_perplexity"]) for name, values in figures.items() if "general_perplexity" in values]
    notes = []
    for (_, before), (stage, after) in pairwise(known):
        if after > before * (1 + FORGETTING_LIMIT):
            notes.append(
                f"⚠ {LABELS[stage]} raised general perplexity by {_percent(before, after)} ({number(before)} → "
                f"{number(after)}): the model forgets general Chinese. Lower the stage's learning_rate or epochs, or "
                "mix general text into the corpus."
            )
    if not notes and len(known) > 2 and known[-1][1] > known[0][1] * (1 + FORGETTING_LIMIT):
        start, end = known[0][1], known[-1][1]
        notes.append(
            f"⚠ No stage alone, but the run as a whole raised general perplexity by {_percent(start, end)} "
            f"({number(start)} → {number(end)}): the model forgets general Chinese little by little."
        )
    return notes


def purpose_table(record: Mapping[str, Any]) -> str:
    """What each finished stage is for and whether it improved that on held-out records."""
    held_out = record.get("held_out", {})
    lines, before = [], held_out.get("start", {})
    for stage in STAGES:
        after = held_out.get(stage)
        if stage not in record.get("stages", {}):
            continue
        for figure in _targets(stage, after or {}):
            if after is None or figure not in after or figure not in before:
                lines.append([LABELS[stage], PURPOSES[stage], f"`{figure}`", "–", "–", "not measured"])
                continue
            gain = _gain(figure, before[figure], after[figure])
            verdict = "improved" if gain > 0 else "unchanged" if gain == 0 else "**worse**"
            values = (_value(figure, before[figure]), _value(figure, after[figure]))
            lines.append([LABELS[stage], PURPOSES[stage], f"`{figure}`", *values, verdict])
        before = after or before
    return markdown(["stage", "what it is for", "figure", "before", "after", ""], lines, text=3) if lines else ""


def _targets(stage: str, measured: Mapping[str, float]) -> list[str]:
    if stage == "mue":
        return sorted(name for name in measured if name.startswith("assistant_loss/")) or ["assistant_loss"]
    targets = {"cpt": ["domain_perplexity"], "sft": ["assistant_loss"]}
    return targets.get(stage, ["preference_accuracy", "preference_margin", "preference_log_odds"])


def _order(figure: str) -> tuple[int, str]:
    order = ("general", "domain", "assistant", "preference")
    return next((place for place, name in enumerate(order) if figure.startswith(name)), len(order)), figure


def _value(figure: str, value: float) -> str:
    return f"{100 * value:.1f} %" if figure == "preference_accuracy" else number(value)


def _gain(figure: str, before: float, after: float) -> float:
    """How much better `after` is."""
    return after - before if figure in _MORE_IS_BETTER else before - after


def _with_change(figure: str, before: float | None, value: float) -> str:
    """`12.34 ▼ 5.1 %`, bold when it is worse; accuracy in points, margin and odds (which have a sign) in nats."""
    if before is None or value == before or not math.isfinite(value) or not math.isfinite(before):
        return _value(figure, value)
    size = abs(value - before)
    change = f"{100 * size:.1f} pt" if figure == "preference_accuracy" else number(size)
    change = change if figure in _MORE_IS_BETTER else _percent(before, value)
    text = f"{'▲' if value > before else '▼'} {change}"
    relative = size if figure in _MORE_IS_BETTER else size / abs(before or 1)
    worse = _gain(figure, before, value) < 0 and relative > _WORTH_MARKING
    return f"{_value(figure, value)} {f'**{text}**' if worse else text}"


def _percent(before: float, after: float) -> str:
    return f"{100 * abs(after - before) / abs(before or 1):.1f} %"
