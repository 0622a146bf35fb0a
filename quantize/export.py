"""The whole way from a source to a distribution folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from quantize import distribution, header, publishing, sizes, writer
from quantize.beside import Beside
from quantize.chat import TemplateFailed
from quantize.distribution.manifest import is_name
from quantize.errors import BadInput
from quantize.fidelity import KEY, RESERVED_BYTES, Expected, Fidelity, Gate
from quantize.merging.adapters import save_lora
from quantize.merging.factors import Merge
from quantize.merging.table import kept_floor
from quantize.metadata import SOURCE, draft, metadata, source_digest
from quantize.mixed import Mixed
from quantize.prepare import Prepared, prepare
from quantize.progress import Progress, labelled
from quantize.reference import Level, logits_bytes
from quantize.source import Source, converted, open_source
from quantize.study import Studied, merge_method, study
from quantize.task_adapters import check_adapters, write_adapters


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None: the default that depends on the source."""

    source: Path
    quants: tuple[str, ...] = ("Q8_0",)
    adapter: Path | None = None
    calibration: Path | None = None
    merge: str | None = None
    rank: int | None = None
    task_adapters: bool = False
    save_lora: Path | None = None
    imatrix: str | None = None
    tensor_types: dict[str, str] = field(default_factory=dict)
    check: Level = "full"
    output: Path | None = None
    name: str | None = None
    force: bool = False

    @property
    def mixed(self) -> list[str]:
        """The types that llama.cpp's quantizer makes."""
        return [quant for quant in self.quants if quant not in writer.DIRECT]

    @property
    def importance(self) -> str:
        """auto, on or off: whether an importance matrix is used."""
        if not self.mixed:
            return "off"
        if self.imatrix == "auto" and self.check == "quick":
            return "on"  # nothing is measured that could tell which file is closer
        return self.imatrix or ("auto" if self.check == "full" else "off")

    def intermediate(self, stored: str) -> str | None:
        """The unquantized file that others are made from and held against; None when no file needs one."""
        return stored if self.mixed or self.check != "quick" else None


@dataclass(frozen=True)
class Result:
    """Where the distribution lies (or the report alone, when a gate failed) and what was measured."""

    folder: Path
    report_file: Path
    report: dict[str, Any]


def export(options: Options, progress: Progress) -> Result:
    """Converts, checks, and only then publishes. Raises BadInput; OSError for a failing disk becomes BadInput."""
    source = open_source(options.source, options.adapter, options.calibration)
    with Beside() as beside:
        return _export(options, source, beside.start(source.inputs, beside.given_up), beside, progress)


def _export(
    options: Options, source: Source, hashed: Future[dict[str, str]], beside: Beside, progress: Progress
) -> Result:
    prepared = prepare(source, options.name)
    options = within_reach(options, prepared)
    output = options.output or Path("dist") / prepared.name
    targets = {quant: output / distribution.file_name(prepared.name, quant) for quant in options.quants}
    publishing.refuse_overwriting(output, list(targets.values()), options.force)
    method = merge_method(prepared, options.merge, options.rank)
    refuse_early(options, method, prepared)
    with publishing.disk_failures(output), publishing.work_folder(output) as work:
        publishing.refuse_full_disk(output, disk_needed(options, prepared, draft(prepared, method)))
        prepared = replace(prepared, source=converted(source, work, uniform_gates=method == "uniform"))
        with _template_refusals(prepared):
            studied = study(
                prepared, method, options.check, work, progress,
                rank=options.rank, tasks=options.task_adapters, importance=options.importance != "off",
            )  # fmt: skip
        files = _Files(options, prepared, studied, hashed, work, beside, progress)
        gates = [*_merge_gates(studied.report), *files.make()]
        adapters = write_adapters(studied.tasks, prepared, work)
        if adapters and all(gate.passed for gate in gates):
            gates += check_adapters(studied.tasks, adapters, files.first, prepared.parameters, work, progress)
        report = {
            "name": prepared.name,
            "check": options.check,
            "passed": all(gate.passed for gate in gates),
            "failed": [f"{gate.name} ({gate.file})" for gate in gates if not gate.passed],
            "gates": [gate.record() for gate in gates],
            "answers": files.answers,
            "merge": studied.report,
            "imatrix": files.imatrix,
            "bytes": {targets[quant].name: path.stat().st_size for quant, path in files.wanted.items()},
        }
        if not report["passed"]:
            return Result(output, publishing.keep_report(output, report), report)
        if options.save_lora is not None and isinstance(studied.merge, Merge):
            save_lora(studied.merge, options.save_lora, prepared.name)
        made = distribution.Export(
            prepared.name,
            prepared.source,
            hashed.result(),
            files.wanted,
            report,
            prepared.vocabulary,
            prepared.parameters,
            context=prepared.context,
            adapters=adapters,
            imatrix=files.imatrix,
            fit=sizes.needs(files.blueprint, {quant: path.stat().st_size for quant, path in files.wanted.items()}),
        )
        documents = distribution.write_documents(made, work)
        publishing.publish(
            output,
            {targets[quant]: path for quant, path in files.wanted.items()}
            | {output / distribution.adapter_name(task): path for task, path in adapters.items()}
            | {output / name: work / name for name in documents},
        )
        return Result(output, output / "fidelity.json", report)


def within_reach(options: Options, prepared: Prepared) -> Options:
    """Where transformers cannot run the model, `full` becomes `file`. Raises BadInput for what needs it running."""
    if prepared.runnable:
        return options
    if options.imatrix in ("auto", "on"):
        raise BadInput(
            "transformers cannot run a Baichuan checkpoint, so there is no importance matrix; leave --imatrix out, or "
            "convert a 7B with `pediatricsgpt train` first."
        )
    return replace(options, check="file" if options.check == "full" else options.check)


class _Files:
    """The model files of one export: each written, then checked, then told what was measured of it."""

    def __init__(
        self,
        options: Options,
        prepared: Prepared,
        studied: Studied,
        hashed: Future[dict[str, str]],
        work: Path,
        beside: Beside,
        progress: Progress,
    ) -> None:
        self._options, self._prepared, self._work, self._progress = options, prepared, work, progress
        self._hashed, self._beside = hashed, beside
        values = {**metadata(prepared, studied.method, studied.report), KEY: " " * RESERVED_BYTES}
        self.blueprint = sizes.Blueprint(prepared.architecture, values, prepared.plans)
        self._weights = writer.Weights(prepared.checkpoint.tensors, studied.merge)
        self._base = options.intermediate(prepared.stored)
        expected = Expected(values, prepared.architecture, prepared.plans, prepared.vocabulary)
        self._fidelity = Fidelity(studied.reference, expected, work, base=self._base, exact=studied.merge is None)
        self._mixed = Mixed(options.importance, options.tensor_types, prepared, studied, self._fidelity, work, progress)
        self._made: dict[str, Path] = {}

    def make(self) -> list[Gate]:
        """All files and their gates; stops at the first that llama.cpp cannot open."""
        gates: list[Gate] = []
        first = [self._base] if self._base else []
        for quant in [*first, *(quant for quant in self._options.quants if quant != self._base)]:
            path = self._work / f"{distribution.file_name(self._prepared.name, quant)}.part"
            self._made[quant] = path
            if quant in writer.DIRECT:
                self._write(path, quant)
            else:
                assert self._base is not None
                self._mixed.make(self._made[self._base], path, quant)
            if quant in self._options.quants:
                self._beside.flush(path)
            gates += self._fidelity.check(
                path, quant, self._truth(quant), labelled(self._progress, f"Checking {quant}")
            )
            if not gates[-1].passed and gates[-1].name == "opens":
                break
        if all(gate.passed for gate in gates):
            # Last, because one file may have been made from another.
            for quant, path in self.wanted.items():
                header.patch(path, KEY, self._fidelity.summary(quant))
                header.patch(path, SOURCE, source_digest(self._hashed.result()))
        return gates

    @property
    def wanted(self) -> dict[str, Path]:
        """The files that were asked for, as far as they were made."""
        return {quant: self._made[quant] for quant in self._options.quants if quant in self._made}

    @property
    def first(self) -> tuple[str, Path]:
        """The file made first, the unquantized one where there is one, and its type."""
        return next(iter(self._made.items()))

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Greedy answers side by side."""
        return self._fidelity.answers

    @property
    def imatrix(self) -> dict[str, Any] | None:
        """What the importance matrix was made of and what it gained."""
        return self._mixed.record

    def _write(self, path: Path, quant: str) -> None:
        writer.write(
            path, self._prepared.architecture, self.blueprint.metadata, self._prepared.plans, self._weights, quant,
            labelled(self._progress, f"Writing {quant}"), sync=False,
        )  # fmt: skip

    def _truth(self, quant: str) -> Any:
        """The float32 rows that a file's weights are held against: the source's, or the unquantized file's."""
        if self._options.check == "quick":
            return None
        if quant != self._base and self._base is not None:
            return header.read(self._made[self._base]).rows
        plans = {plan.name: plan for plan in self._prepared.plans}
        return lambda tensor, start, stop: self._weights.rows(plans[tensor], start, stop)


@contextlib.contextmanager
def _template_refusals(prepared: Prepared) -> Iterator[None]:
    """A template may refuse what stands in the dialogues: a system message, two questions in a row."""
    try:
        yield
    except (TemplateFailed, TemplateError) as error:
        raise BadInput(
            f"{prepared.checkpoint.folder}: the chat template does not take a dialogue it was given ({error}); give "
            "dialogues of the form the model was trained on with --calibration, or correct the template."
        ) from error


def refuse_early(options: Options, method: str | None, prepared: Prepared) -> None:
    """What would fail after an hour is said at once. Raises BadInput."""
    if method not in (None, "uniform", "universal") and not prepared.runnable:
        raise BadInput(
            f"Merging by {method} needs the model running, and transformers cannot run a Baichuan checkpoint; merge "
            "with --merge uniform."
        )
    if method not in (None, "uniform", "universal") and not prepared.source.calibration:
        raise BadInput(
            f"Merging by {method} needs dialogues; give some with --calibration, or merge with --merge uniform."
        )
    if (options.task_adapters or options.rank) and method != "least-squares":
        raise BadInput("--task-adapters and --rank need experts merged by least squares, and so --calibration.")
    for task in {dialogue.task for dialogue in prepared.source.calibration} - {""} if options.task_adapters else ():
        if not is_name(distribution.adapter_name(task)):
            raise BadInput(f"The task {task!r} makes no file name; call it by letters, digits, '.', '_' or '-'.")
    if options.save_lora is not None and method is None:
        raise BadInput("--save-lora saves merged experts; this source has none.")
    if options.save_lora is not None and options.save_lora.exists():
        raise BadInput(f"{options.save_lora} exists already; choose another folder with --save-lora.")
    for quant in options.mixed:
        if sizes.MIXTURES[quant][1] in sizes.NEED_IMATRIX and options.importance == "off":
            remedy = "add --imatrix on, or choose Q3_K_M" if prepared.runnable else "choose Q3_K_M"
            raise BadInput(f"{quant} needs an importance matrix; {remedy}.")
    if options.tensor_types:
        if not options.mixed:
            raise BadInput("--tensor-type works with K- and IQ-types (Q4_K_M …), which llama.cpp's quantizer makes.")
        sizes.override_types({plan.name: plan.shape for plan in prepared.plans}, options.tensor_types)


def disk_needed(options: Options, prepared: Prepared, model: sizes.Blueprint) -> int:
    """Free bytes an export needs meanwhile."""
    logits = logits_bytes(len(prepared.vocabulary.tokens)) if options.check != "quick" else 0
    # Two files of one type at a time while auto compares them.
    twins = [sizes.file_bytes(model, quant) for quant in options.mixed] if options.importance == "auto" else []
    base = options.intermediate(prepared.stored)
    return sizes.disk_needed(model, options.quants, base, logits + max(twins, default=0))


def _merge_gates(report: dict[str, Any] | None) -> list[Gate]:
    """Merging must keep at least the floor of what the experts really gained."""
    if report is None or report["kept"] is None:
        return []
    kept, floor = report["kept"], kept_floor(report)
    detail = f"share of the experts' gain of {report['gain']:.4f} nats, on {report['measured_on']}"
    return [Gate("merge_kept", "merge", kept, floor, floor is None or kept >= floor, detail)]
