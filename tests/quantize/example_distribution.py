"""A distribution whose documents are real and whose model files are small, well-formed GGUFs of noise."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from quantize import distribution, publishing
from quantize.distribution import Export
from quantize.source import Source
from trainer.prompts import chat_template, prompts

EXAMPLE_ROWS = 1280  # of 256 float32: 1.25 MiB, more than one block of a download


@dataclass(frozen=True)
class ExampleVocabulary:
    """What the documents ask of a vocabulary."""

    chat_template: str
    tokens: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    eos: int = 2
    other_end: int | None = 0
    bos: int | None = None
    add_bos: bool = False
    nfc: bool = True


def inference_template() -> str:
    """Our chat template without the tags that only training reads."""
    return re.sub(r"\{% (end)?generation %\}", "", chat_template())


def example_export(work: Path, **changes: Any) -> Export:
    """Two quants and one task adapter, written under `work`, with a report that passed."""
    files = {quant: work / f"tiny-{quant}.gguf.part" for quant in ("Q8_0", "Q4_K_M")}
    adapters = {"diagnosis": work / "adapters/diagnosis.gguf.part"}
    (work / "adapters").mkdir(parents=True, exist_ok=True)
    for seed, path in enumerate((*files.values(), *adapters.values())):
        write_noise(path, seed, rows=EXAMPLE_ROWS if seed < 2 else 4)
    gates = [
        {"name": name, "file": quant, "value": value, "limit": None, "passed": True, "detail": "Q8_0×2"}
        for quant in files
        for name, value in (("types", "x"), ("kld_vs_f32", 0.0123), ("kld99_vs_f32", 0.456), ("top1_vs_f32", 0.75))
    ]
    values: dict[str, Any] = {
        "name": "tiny",
        "source": Source("tiny", work, prompts=prompts(), run={"corpus_sha256": "c" * 64, "recipe": {"base": None}}),
        "inputs": {"run.json": "0" * 64},
        "files": files,
        "report": {"name": "tiny", "check": "full", "passed": True, "failed": [], "gates": gates, "merge": None},
        "vocabulary": ExampleVocabulary(inference_template()),
        "parameters": 1_234_567,
        "context": 8192,
        "adapters": adapters,
    }
    return Export(**(values | changes))


def write_noise(path: Path, seed: int, rows: int) -> None:
    """A GGUF with one float32 matrix."""
    writer = GGUFWriter(path, "qwen3")
    writer.add_name("tiny")
    writer.add_tensor("token_embd.weight", np.random.default_rng(seed).normal(size=(rows, 256)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_distribution(folder: Path, **changes: Any) -> Path:
    """Writes and publishes an example into `folder`, as an export does; returns it."""
    with publishing.work_folder(folder) as work:
        export = example_export(work, **changes)
        documents = distribution.write_documents(export, work)
        files = {folder / distribution.file_name("tiny", quant): path for quant, path in export.files.items()}
        files |= {folder / distribution.adapter_name(task): path for task, path in export.adapters.items()}
        publishing.publish(folder, files | {folder / name: work / name for name in documents})
    return folder
