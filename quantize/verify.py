"""Checks of a finished GGUF, ours or anybody's: by itself, against its source, or against another file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import LlamaFileType

from quantize import chat, header, limits, probe, reference, usable, writer
from quantize.child import ChildFailed
from quantize.comparison import RowsOf, Track, sampled_blocks
from quantize.errors import BadInput
from quantize.fidelity import KEY, Expected, Fidelity, Gate
from quantize.own_words import OwnWords
from quantize.prepare import Prepared, prepare
from quantize.progress import Progress
from quantize.reference import Level, Reference
from quantize.run_folder import file_sha256
from quantize.source import open_source

# (what is being done, done, total)


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `level` None: the most that is possible."""

    file: Path
    against: Path | None = None
    reference: Path | None = None
    level: Level | None = None


def verify(options: Options, progress: Progress) -> dict[str, Any]:
    """Runs the checks and returns the report: `passed`, `failed`, `gates`, `answers`, `claims` and more.

    Raises BadInput naming the cause when a file is no GGUF that llama.cpp can open, or the source does not fit.
    """
    head = _read(options.file)
    level = options.level or ("full" if options.against else "file")
    quant = type_name(head)
    gates = [_checksum(options.file, quant)]
    with tempfile.TemporaryDirectory(prefix="pediatricsgpt-verify-") as folder:
        try:
            checks = _Checks(options, head, quant, level, Path(folder), progress)
            gates += checks.run()
        except chat.TemplateFailed as error:
            gates.append(Gate("chat_template", quant, None, 0, False, str(error)))
            answers: list[dict[str, Any]] = []
        except ChildFailed as error:
            gates.append(Gate("opens", quant, None, "llama.cpp loads it", False, str(error)))
            answers = []
        else:
            answers, level = checks.answers, checks.level
    return {
        "name": options.file.name,
        "level": level,
        "passed": all(gate.passed for gate in gates),
        "failed": [f"{gate.name} ({gate.file})" for gate in gates if not gate.passed],
        "gates": [gate.record() for gate in gates],
        "answers": answers,
        "claims": _claims(head),
        "architecture": head.architecture,
        "parameters": head.parameters,
        "bytes": {options.file.name: options.file.stat().st_size},
    }


def type_name(head: header.Header) -> str:
    """The quantization a file says it is, or the type of most of its tensors."""
    try:
        name = LlamaFileType(head.metadata.get("general.file_type", -1)).name
    except ValueError:
        return next(iter(head.types()), "?")
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


class _Checks:
    """The checks of one file at one level."""

    def __init__(
        self, options: Options, head: header.Header, quant: str, level: Level, folder: Path, progress: Progress
    ) -> None:
        self._options, self._head, self._quant, self._folder = options, head, quant, folder
        self._progress = progress
        self.level: Level = level
        self.answers: list[dict[str, Any]] = []

    def run(self) -> list[Gate]:
        """All gates. Raises BadInput, ChildFailed, TemplateFailed."""
        gates: list[Gate] = []
        truth: RowsOf | None = None
        words = OwnWords.of(self._head)
        expected = Expected({}, self._head.architecture, [], words)
        if self._options.against is not None:
            prepared = _source(self._options.against)
            values = {**prepared.hyper_parameters, **prepared.vocabulary.metadata()}
            expected = Expected(values, prepared.architecture, prepared.plans, prepared.vocabulary)
            found, truth = self._against(prepared, gates), _rows(prepared, self._head)
        else:
            self.level = "quick" if self.level == "quick" else "file"
            context = self._head.metadata[f"{self._head.architecture}.context_length"]
            found = reference.collect_own(
                self._options.file, words, context, self.level, self._folder / "own", parameters=self._head.parameters
            )
        other = "hf"
        if self._options.reference is not None:
            found, other = self._beside(self._options.reference, found), self._options.reference.name
        strict = self._quant in limits.FLOATS and self._options.reference is None
        fidelity = Fidelity(
            found, expected, self._folder, base=self._quant if strict else None, parameters=self._head.parameters,
            exact=True, other=other,
        )  # fmt: skip
        if self.level == "quick":
            truth = None
        gates += fidelity.check(self._options.file, self._quant, truth, self._bar("Checking"))
        if self.level != "quick" and truth is None:
            gates.append(_finite_weights(self._head, self._quant))
        self.answers = fidelity.answers
        return gates

    def _against(self, prepared: Prepared, gates: list[Gate]) -> Reference:
        """The source's own ids, and at level `full` what Hugging Face makes of the texts."""
        words, source, parameters = prepared.vocabulary, prepared.source, prepared.parameters
        if self.level == "full":
            try:
                from quantize.hugging_face import HuggingFace, suitable_threads

                with suitable_threads(parameters):
                    live = HuggingFace(source.checkpoint)
                    bar = self._bar("Running Hugging Face")
                    return reference.collect(live, source, words, self._folder / "hf", bar, parameters=parameters)
            except (BadInput, ImportError) as error:  # no such model in transformers, or no transformers
                if self._options.level == "full":
                    raise BadInput(str(error)) from error
                self.level = "file"
                gates.append(Gate("level", self._quant, "file", None, True, f"not against Hugging Face: {error}"))
        return reference.collect_plain(source, words, prepared.context or 512, self.level, parameters=parameters)

    def _beside(self, file: Path, found: Reference) -> Reference:
        """The reference with another GGUF in the place of Hugging Face. Raises BadInput for another model's file."""
        head = _read(file)
        mine = self._head.metadata["tokenizer.ggml.tokens"].data
        if head.metadata["tokenizer.ggml.tokens"].data != mine:
            raise BadInput(
                f"{file.name} has another vocabulary than {self._options.file.name}; they cannot be compared."
            )
        folder = self._folder / "reference"
        folder.mkdir()
        sequences = found.sequences[: found.measured]
        track = Track(sequences, folder, reference.kept_positions(len(head.metadata["tokenizer.ggml.tokens"])))
        request = probe.Request(sequences=sequences, prompts=found.prompts, limit=found.limit)
        answer = probe.probe(file, request, folder, self._bar(f"Running {file.name}"), track.add)
        return replace(found, track=track, generated=answer.generated, answers=answer.texts, gaps=None)

    def _bar(self, label: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(label, done, total)


def _read(file: Path) -> header.Header:
    if not file.is_file():
        raise BadInput(f"There is no file {file}.")
    try:
        head = header.read(file)
        try:
            usable.check(head)
        except header.Malformed as error:
            raise header.named(error, file) from error
    except header.Malformed as error:
        raise BadInput(str(error)) from error
    return head


def _source(folder: Path) -> Prepared:
    source = open_source(folder, None, None)
    if source.adapter is not None:
        raise BadInput(
            f"{folder} is a run folder; its file holds merged experts, which only the export itself can compare. "
            "Give a checkpoint folder with --against, or verify the file by itself."
        )
    return prepare(source, None)


def _rows(prepared: Prepared, head: header.Header) -> RowsOf:
    shapes = {name: tensor.shape for name, tensor in head.tensors.items()}
    plans = {plan.name: plan for plan in prepared.plans if shapes.get(plan.name) == plan.shape}
    weights = writer.Weights(prepared.checkpoint.tensors, None)

    def rows(name: str, start: int, stop: int) -> np.ndarray:
        if name not in plans:
            return np.full(1, np.nan, np.float32)  # a tensor the source lacks, or has in another shape, rounds nothing
        return weights.rows(plans[name], start, stop)

    return rows


def _checksum(file: Path, quant: str) -> Gate:
    """The file against the SHA256SUMS and the manifest that lie beside it."""
    wanted = {**_sums(file.parent / "SHA256SUMS"), **_outputs(file.parent / "manifest.json")}
    if file.name not in wanted:
        return Gate("checksum", quant, "none", None, True, "no SHA256SUMS or manifest.json names this file")
    found = file_sha256(file)
    agrees = wanted[file.name] == found and _sums(file.parent / "SHA256SUMS").get(file.name, found) == found
    detail = "as SHA256SUMS and manifest.json say" if agrees else "the file was changed after it was published"
    return Gate("checksum", quant, found[:16], wanted[file.name][:16], agrees, detail)


def _sums(file: Path) -> dict[str, str]:
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return {}
    return {parts[1].lstrip("*"): parts[0] for parts in lines if len(parts) == 2}


def _outputs(file: Path) -> dict[str, str]:
    try:
        outputs = json.loads(file.read_text(encoding="utf-8"))["outputs"]
        return {str(name): str(record["sha256"]) for name, record in outputs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _finite_weights(head: header.Header, quant: str) -> Gate:
    wrong = [
        name
        for name, tensor in head.tensors.items()
        if not all(np.isfinite(head.rows(name, *block)).all() for block in sampled_blocks(tensor.shape))
    ]
    detail = (
        f"first: {wrong[0]}" if wrong else f"{len(head.tensors)} tensors hold numbers, large ones on evenly spread rows"
    )
    return Gate("finite_weights", quant, len(wrong), 0, not wrong, detail)


def _claims(head: header.Header) -> dict[str, Any] | None:
    """What the file says was measured of it when it was made."""
    try:
        found = json.loads(head.metadata.get(KEY, ""))
        # What Python reads but no report can hold: NaN, half a character.
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
