"""One small adapter per consultation task, on top of the merged file: written, and held against Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantize import limits, probe
from quantize.child import ChildFailed
from quantize.comparison import Comparison, Track
from quantize.fidelity import Gate
from quantize.merging.adapters import write_gguf
from quantize.merging.factors import Merge, difference
from quantize.prepare import Prepared
from quantize.progress import Progress

if TYPE_CHECKING:  # imports torch
    from quantize.live import Live

_TOKENS = 64


@dataclass(frozen=True)
class TaskAdapter:
    """What turns the merged model into a task's, and the logits that Hugging Face then computes for `ids`."""

    more: Merge
    ids: list[int]
    logits: np.ndarray  # float32 [tokens, vocabulary]


def task_adapters(live: Live, merge: Merge, tasks: dict[str, Merge], prepared: Prepared) -> dict[str, TaskAdapter]:
    """`live` must have `merge` folded in."""
    found = {}
    for task, wanted in tasks.items():
        dialogue = next(dialogue for dialogue in prepared.source.calibration if dialogue.task == task)
        ids = live.chat_ids(dialogue.messages, answer_next=False)[:_TOKENS]
        more = difference(wanted, merge)
        with live.merged(live.tensors(more)):
            found[task] = TaskAdapter(more, ids, live.logits(ids))
    return found


def write_adapters(adapters: dict[str, TaskAdapter], prepared: Prepared, work: Path) -> dict[str, Path]:
    """Writes each as a GGUF LoRA file; returns the unfinished files by task."""
    paths = {}
    for task, adapter in adapters.items():
        paths[task] = path = work / f"{task}.gguf.part"
        write_gguf(path, adapter.more, prepared.architecture, prepared.plans, f"{prepared.name} {task}")
    return paths


def check_adapters(
    adapters: dict[str, TaskAdapter],
    paths: dict[str, Path],
    model: tuple[str, Path],
    parameters: int,
    work: Path,
    progress: Progress,
) -> list[Gate]:
    """Puts each adapter on a file of the model (type, path) in llama.cpp and compares the logits."""
    quant, file = model
    limit = limits.kld(quant, parameters)
    gates = []
    for number, (task, adapter) in enumerate(adapters.items(), 1):
        folder = work / f"adapter-{task}"
        folder.mkdir()
        track = Track([adapter.ids], folder, len(adapter.ids))
        track.add(0, 0, adapter.logits)
        compared = Comparison(track, 0.0)
        request = probe.Request(sequences=[adapter.ids], adapter=str(paths[task]))
        try:
            probe.probe(file, request, folder, lambda *_: None, compared.add)
        except ChildFailed as error:
            gates.append(Gate(f"adapter_{task}", quant, None, limit, False, str(error)))
            continue
        kld = compared.result().mean_kld
        detail = f"mean KL divergence in nats from Hugging Face with this adapter, {len(adapter.ids)} tokens"
        gates.append(Gate(f"adapter_{task}", quant, kld, limit, kld <= limit, detail))
        progress("Checking the task adapters", number, len(adapters))
    return gates
