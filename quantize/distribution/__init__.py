"""The folder that is handed on: model card, Ollama file, fidelity report, manifest, checksums."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.distribution import manifest, modelfile
from quantize.distribution.manifest import CARD, MANIFEST, MODELFILE, REPORT, SUMS
from quantize.distribution.model_card import CardFile, model_card
from quantize.distribution.origin import Origin
from quantize.run_folder import file_sha256
from quantize.sizes import Need
from quantize.source import Source

if TYPE_CHECKING:
    from quantize.vocabulary import Vocabulary


@dataclass(frozen=True)
class Export:
    """What the documents of a distribution are written from.

    `inputs`: file → sha256. `files`: quant → unfinished model file; `adapters`: task → unfinished adapter file.
    `report`: fidelity.json's content. `context`: tokens the model was made for. `imatrix`: what the importance
    matrix was made of. `fit`: the memory that each file needs (`sizes.needs`).
    """

    name: str
    source: Source
    inputs: dict[str, str]
    files: dict[str, Path]
    report: dict[str, Any]
    vocabulary: Vocabulary
    parameters: int
    context: int | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    imatrix: dict[str, Any] | None = None
    fit: list[Need] = field(default_factory=list)


def file_name(name: str, quant: str) -> str:
    """Name of a model file in the distribution."""
    return f"{name}-{quant}.gguf"


def adapter_name(task: str) -> str:
    """Name of a task adapter in the distribution."""
    return f"adapters/{task}.gguf"


def write_documents(export: Export, folder: Path) -> list[str]:
    """Writes README.md, Modelfile, fidelity.json, manifest.json and SHA256SUMS; returns their names in that order.

    The last two name every file of the distribution by sha256.
    """
    models = {quant: file_name(export.name, quant) for quant in export.files}
    adapters = {task: adapter_name(task) for task in export.adapters}
    paths = {models[quant]: path for quant, path in export.files.items()}
    paths |= {adapters[task]: path for task, path in export.adapters.items()}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    card = model_card(
        export,
        {quant: CardFile(name, sizes[name]) for quant, name in models.items()},
        {task: CardFile(name, sizes[name]) for task, name in adapters.items()},
    )
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    (folder / MODELFILE).write_text(_modelfile(export, list(models.values()), adapters), encoding="utf-8", newline="\n")
    manifest.write_json(folder / REPORT, export.report)
    paths |= {name: folder / name for name in (CARD, MODELFILE, REPORT)}
    sums = {name: file_sha256(path) for name, path in paths.items()}
    outputs = {name: {"sha256": sums[name], "bytes": path.stat().st_size} for name, path in paths.items()}
    manifest.write_json(folder / MANIFEST, _manifest(export, outputs))
    manifest.write_sums(folder / SUMS, sums | {MANIFEST: file_sha256(folder / MANIFEST)})
    return [CARD, MODELFILE, REPORT, MANIFEST, SUMS]


def _manifest(export: Export, outputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    source, prompts = export.source, export.source.prompts
    return {
        "name": export.name,
        "contract": prompts["contract"] if prompts else None,
        "demonstration": source.demonstration,
        "run": source.name if source.run else None,
        "git_commit": source.run.get("git_commit"),
        "corpus_sha256": source.run.get("corpus_sha256"),
        "licence": Origin.of(source).licence,
        "merge_method": (export.report.get("merge") or {}).get("method"),
        "imatrix": export.imatrix,
        "inputs": export.inputs,
        "outputs": outputs,
        "versions": manifest.versions(),
    }


def _modelfile(export: Export, models: list[str], adapters: dict[str, str]) -> str:
    vocabulary = export.vocabulary
    ends = [vocabulary.tokens[end] for end in (vocabulary.eos, vocabulary.other_end) if end is not None]
    # llama.cpp writes the beginning of the text by itself where the file says so, for Ollama too.
    bos = "" if vocabulary.add_bos or vocabulary.bos is None else vocabulary.tokens[vocabulary.bos]
    found = modelfile.turns(vocabulary.chat_template, ends[0], bos)
    return modelfile.modelfile(models[0], models[1:], adapters, found, ends, export.context, export.source.prompts)
