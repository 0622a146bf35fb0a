"""What merging the experts costs, measured on the calibration dialogues."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quantize.experts import Adapter, Merge
from quantize.run_folder import RunFolder

if TYPE_CHECKING:  # imports torch
    from quantize.live import Live

_MIN_GAIN = 1e-3  # nats; a share of a smaller gain means nothing


def measure_merge(
    live: Live, adapter: Adapter, run: RunFolder, method: str, progress: Callable[[str, int, int], None]
) -> tuple[Merge, dict[str, Any]]:
    """Chooses the coefficients and folds them into `live`; losses are nats per assistant token.

    `kept` is the share of the experts' gain over the base that the merged model keeps (it may be negative),
    None when the experts gained next to nothing.
    """
    dialogues = live.tokenise(run.calibration)

    def counter(label: str) -> Callable[[], None]:
        done = iter(range(1, len(dialogues) + 1))
        return lambda: progress(label, next(done), len(dialogues))

    usage, nll_live = live.measure(dialogues, counter("Measuring the live experts"))
    nll_base = live.base_loss(dialogues, counter("Measuring the base model"))
    merge = Merge(adapter, method, usage)
    live.fold(merge)
    nll_merged = live.base_loss(dialogues, counter("Measuring the merged model"))
    gain = nll_base - nll_live
    return merge, {
        "method": method,
        "nll_base": nll_base,
        "nll_merged": nll_merged,
        "nll_live": nll_live,
        "gain": gain,
        "kept": (nll_base - nll_merged) / gain if gain > _MIN_GAIN else None,
        "dialogues": len(dialogues),
        "tokens": sum(sum(dialogue.assistant[1:]) for dialogue in dialogues),
    }


def merge_sentence(merge: dict[str, Any]) -> str:
    """The measured cost of merging as one sentence."""
    figures = (
        f"Loss in nats per assistant token on {merge['dialogues']} calibration dialogues ({merge['tokens']} tokens): "
        f"base {merge['nll_base']:.4f}, merged ({merge['method']}) {merge['nll_merged']:.4f}, "
        f"live experts {merge['nll_live']:.4f}."
    )
    if merge["kept"] is None:
        return f"{figures} The experts gained nothing worth keeping over the base ({merge['gain']:+.4f} nats)."
    return f"{figures} Merging kept {merge['kept']:.1%} of the experts' gain."
