"""The report on a merge in words and as a table."""

from __future__ import annotations

from typing import Any

_REAL_GAIN = 0.01  # nats; below, chance decides which share is kept
_FLOOR = 0.5


def kept_floor(merge: dict[str, Any]) -> float | None:
    """The least share of the experts' gain that an export must keep; None where the share is only reported.

    Least squares keeps 0.96 and more of a real gain (benchmarks/README.md); one that keeps less than half was made from
    dialogues that have little to do with the model's. The other methods are chosen by hand, and what they cost is said.
    """
    return _FLOOR if merge["method"] == "least-squares" and merge["gain"] > _REAL_GAIN else None


def merge_sentence(merge: dict[str, Any]) -> str:
    """The measured cost of merging as one sentence."""
    figures = (
        f"Loss in nats per assistant token on {merge['dialogues']} {merge['measured_on']} ({merge['tokens']} tokens): "
        f"base {merge['nll_base']:.4f}, merged ({merge['method']}) {merge['nll_merged']:.4f}, "
        f"live experts {merge['nll_live']:.4f}."
    )
    if merge["kept"] is None:
        return f"{figures} The experts gained nothing worth keeping over the base ({merge['gain']:+.4f} nats)."
    tasks = merge.get("kept_per_task")
    more = "" if tasks is None else f", {tasks:.1%} with one adapter per task"
    return f"{figures} Merging kept {merge['kept']:.1%} of the experts' gain{more}."


def merge_rows(merge: dict[str, Any]) -> list[list[str]]:
    """The table of all ways of merging, header first; the chosen one is marked."""
    rows = [["merge", "nats per token", "gain kept", "KLD to live", "same first choice", "layer error"]]
    for found in merge["table"]:
        rows.append(
            [
                f"{found['name']} (chosen)" if found["name"] == merge["method"] else found["name"],
                f"{found['nll']:.4f}",
                "–" if found["kept"] is None else f"{found['kept']:.1%}",
                f"{found['kld']:.4f}",
                f"{found['top1']:.1%}",
                "–" if found["layer_error"] is None else f"{found['layer_error']:.1%}",
            ]
        )
    return rows
