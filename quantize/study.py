"""The part of an export that runs the model: merging, importance of the columns, and the reference outputs.

Only this part needs torch, and only when something here asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import BadInput
from quantize.merging import METHODS
from quantize.merging.constants import constant_gates
from quantize.merging.experts import Adapter
from quantize.merging.factors import Merge
from quantize.merging.lora import LoraMerge
from quantize.prepare import Prepared
from quantize.progress import Progress, labelled
from quantize.reference import Level, Reference, collect, collect_plain
from quantize.task_adapters import TaskAdapter, task_adapters

if TYPE_CHECKING:  # imports torch
    from quantize.hugging_face import HuggingFace
    from quantize.importance import Importance

_CARDS = Path(__file__).resolve().parent.parent / "tui" / "library" / "cards"
_SEQUENCE_TOKENS = 512
_IMPORTANCE_WORK = 8e12  # parameters times tokens: some minutes of a laptop's processor


@dataclass(frozen=True)
class Studied:
    """What the model itself had to tell.

    merge: what is folded into the weights. tasks: per task what to put on top.
    report: what merging costs, None when nothing was merged or could be measured.
    """

    merge: Merge | LoraMerge | None
    reference: Reference
    tasks: dict[str, TaskAdapter] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    importance: Importance | None = None
    importance_text: str = ""

    @property
    def method(self) -> str | None:
        """How an adapter was merged: a method of METHODS, or lora; None without one."""
        return self.merge.method if self.merge is not None else None


def merge_method(prepared: Prepared, wanted: str | None, rank: int | None) -> str | None:
    """How the experts are merged: what was asked for, else the best that is possible; None without experts.

    Raises BadInput for what cannot be.
    """
    source = prepared.source
    if source.kind not in ("mue", "released"):
        if wanted or rank:
            raise BadInput("--merge and --rank are for MUE experts; this source has none.")
        return None
    possible = bool(source.calibration) and prepared.runnable
    return wanted or (METHODS[0] if possible else "uniform")


def study(
    prepared: Prepared,
    method: str | None,
    level: Level,
    work: Path,
    progress: Progress,
    *,
    rank: int | None = None,
    tasks: bool = False,
    importance: bool = False,
) -> Studied:
    """Everything in one loading of the model; without torch when `level` and the merge can do without it.

    Raises BadInput.
    """
    source, context = prepared.source, prepared.context
    measured = method is not None and bool(source.calibration) and prepared.runnable
    if level != "full" and not measured and not importance:
        reference = collect_plain(source, prepared.vocabulary, context, level, parameters=prepared.parameters)
        return Studied(_folded(prepared, method), reference)
    from quantize.hugging_face import HuggingFace, suitable_threads

    with suitable_threads(prepared.parameters):
        progress("Loading the model", 0, 1)
        if method is not None and measured and source.adapter is not None:
            from quantize.live import Live
            from quantize.merging.merge import merge_experts

            adapter = _experts(prepared)
            model: HuggingFace = Live(source.checkpoint, source.adapter)
            progress("Loading the model", 1, 1)
            merged = merge_experts(
                model, adapter, source.calibration, source.held_out, method, work, progress, rank=rank, tasks=tasks
            )
            merge, report = merged.merge, merged.report
            model.fold(merge)
            tops = task_adapters(model, merge, merged.tasks, prepared)
        else:
            model = HuggingFace(source.checkpoint)
            progress("Loading the model", 1, 1)
            merge, report, tops = _folded(prepared, method), None, {}
            if merge is not None:
                model.fold(merge)
        found, text = _importance(prepared, model, progress) if importance else (None, "")
        if level == "full":
            reference = collect(
                model, source, prepared.vocabulary, work / "hf",
                labelled(progress, "Running the reference"), parameters=prepared.parameters,
            )  # fmt: skip
        else:
            reference = collect_plain(source, prepared.vocabulary, context, level, parameters=prepared.parameters)
    return Studied(merge, reference, tops, report, found, text)


def _folded(prepared: Prepared, method: str | None) -> Merge | LoraMerge | None:
    """The merge that needs no model: constant gates, an ordinary LoRA, or nothing."""
    source = prepared.source
    if source.adapter is None:
        return None
    if method is None:
        lora = LoraMerge(source.adapter)
        lora.check(prepared.plans, prepared.checkpoint.tensors)
        return lora
    return constant_gates(_experts(prepared), method)


def _experts(prepared: Prepared) -> Adapter:
    assert prepared.source.adapter is not None
    adapter = Adapter(prepared.source.adapter)
    adapter.check(prepared.plans)
    return adapter


def _importance(prepared: Prepared, model: HuggingFace, progress: Progress) -> tuple[Importance, str]:
    """Importance on the calibration dialogues, or on the card library for a model that came without any."""
    from quantize.importance import collect as collect_importance

    dialogues = prepared.source.calibration
    if dialogues:
        sequences = [model.chat_ids(dialogue.messages, answer_next=False) for dialogue in dialogues]
    else:
        sequences = [model.text_ids(card.read_text(encoding="utf-8")) for card in sorted(_CARDS.glob("*.md"))]
    longest = min(model.context, _SEQUENCE_TOKENS)
    budget = int(min(65_536, max(2048, _IMPORTANCE_WORK / prepared.parameters)))
    kept: list[list[int]] = []
    for ids in sequences:
        if sum(map(len, kept)) >= budget:
            break
        kept.append(ids[:longest])
    found = collect_importance(
        model.model, kept, lambda done: progress("Measuring the importance of columns", done, len(kept))
    )
    return found, "calibration dialogues of the source" if dialogues else "PediatricsGPT card library"
