"""The whole way from a run folder to a distribution folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from quantize import architectures, distribution, header, quantizer, tokenizer, writer
from quantize.architectures import Value
from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput
from quantize.experts import Adapter, Merge
from quantize.fidelity import REFERENCE, Expected, Fidelity, Gate
from quantize.run_folder import RunFolder

_WORK = ".quantize.part"
_LOCK = ".quantize.lock"
# Bytes per weight, for the disk check; K-quants may fall back to 8-bit blocks for narrow matrices.
_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 1.07, "Q6_K": 1.07, "Q5_K_M": 1.0, "Q4_K_M": 1.0, "IQ4_XS": 0.8, "Q4_0": 0.8}
_SPARE_BYTES = 64 << 20
_MIN_GAIN = 1e-4  # nats; below this the experts' gain is rounding, and a share of it means nothing

# (what is being done, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    run: Path
    quants: tuple[str, ...]
    merge: str
    output: Path | None
    name: str | None
    force: bool


@dataclass(frozen=True)
class Result:
    """Where the distribution lies (or the report alone, when a gate failed) and what was measured."""

    folder: Path
    report_file: Path
    report: dict[str, Any]


def export(options: Options, progress: Progress) -> Result:
    """Converts, checks, and only then publishes. Raises BadInput; OSError for a failing disk becomes BadInput."""
    run = RunFolder.open(options.run)
    name = options.name or run.name
    output = options.output or Path("dist") / name
    targets = {quant: output / distribution.file_name(name, quant) for quant in options.quants}
    _refuse_overwriting(output, list(targets.values()), options.force)
    checkpoint = Checkpoint(run.checkpoint)
    architecture = architectures.for_config(checkpoint.config)
    plans = architecture.plan(checkpoint.config)
    checkpoint.check(plans)
    adapter = Adapter(run.adapter)
    adapter.check(plans)
    vocabulary = tokenizer.read(run.checkpoint, checkpoint.config["vocab_size"])
    hyper_parameters = architecture.metadata(checkpoint.config)
    parameters = sum(_elements(plan.shape) for plan in plans)
    with _disk_failures(output), _work_folder(output) as work:
        _refuse_full_disk(output, parameters, options.quants)
        inputs = run.inputs()
        merge, merge_report, reference = _measure(run, adapter, vocabulary, options.merge, work, progress)
        expected = Expected(
            {**hyper_parameters, **vocabulary.metadata(), **_contract(run, name, merge_report, inputs, parameters)},
            architecture.NAME,
            plans,
            vocabulary,
        )
        weights = writer.Weights(checkpoint.tensors, merge)
        by_name = {plan.name: plan for plan in plans}
        fidelity = Fidelity(reference, expected, work)
        gates: list[Gate] = []
        files: dict[str, Path] = {}
        for quant in (REFERENCE, *(q for q in options.quants if q != REFERENCE)):
            files[quant] = path = work / f"{distribution.file_name(name, quant)}.part"
            _make(path, quant, files[REFERENCE], expected, weights, work, progress)
            truth = (
                (lambda tensor, start, stop: weights.rows(by_name[tensor], start, stop))
                if quant == REFERENCE
                else header.read(files[REFERENCE]).rows
            )
            gates += fidelity.check(path, quant, truth, _labelled(progress, f"Checking {quant}"))
            if not gates[-1].passed and gates[-1].name == "opens":
                break
        wanted = {quant: files[quant] for quant in options.quants if quant in files}
        report = _report(name, gates, merge_report, wanted)
        if not report["passed"]:
            return Result(output, _keep_report(output, report), report)
        made = distribution.Export(
            name, run, inputs, wanted, report, vocabulary.chat_template, vocabulary.tokens[vocabulary.eos], parameters
        )
        documents = distribution.write_documents(made, work)
        _publish(output, {targets[q]: path for q, path in wanted.items()} | {output / d: work / d for d in documents})
        return Result(output, output / "fidelity.json", report)


def _measure(
    run: RunFolder, adapter: Adapter, vocabulary: tokenizer.Vocabulary, method: str, work: Path, progress: Progress
) -> tuple[Merge, dict[str, Any], Any]:
    from quantize import reference
    from quantize.live import Live

    progress("Loading the live model", 0, 1)
    live = Live(run.checkpoint, run.adapter)
    progress("Loading the live model", 1, 1)
    dialogues = live.tokenise(run.calibration)

    def counter(label: str) -> Callable[[], None]:
        done = iter(range(1, len(dialogues) + 1))
        return lambda: progress(label, next(done), len(dialogues))

    usage, nll_live = live.measure(dialogues, counter("Measuring gates and live experts"))
    nll_base = live.base_loss(dialogues, counter("Measuring the base model"))
    merge = Merge(adapter, method, usage)
    live.fold(merge)
    nll_merged = live.base_loss(dialogues, counter("Measuring the merged model"))
    gain = nll_base - nll_live
    report = {
        "method": method,
        "nll_base": nll_base,
        "nll_merged": nll_merged,
        "nll_live": nll_live,
        "gain": gain,
        "kept": (nll_base - nll_merged) / gain if gain > _MIN_GAIN else None,
        "dialogues": len(dialogues),
        "tokens": sum(sum(dialogue.assistant[1:]) for dialogue in dialogues),
    }
    truth = reference.collect(live, run, vocabulary, work / "hf", _labelled(progress, "Running the reference"))
    return merge, report, truth


def _make(
    path: Path, quant: str, reference: Path, expected: Expected, weights: writer.Weights, work: Path, progress: Progress
) -> None:
    if quant not in writer.DIRECT:
        quantizer.quantize(reference, path, quant, work, _labelled(progress, f"Quantizing {quant}"))
        return
    report = _labelled(progress, f"Writing {quant}")
    writer.write(path, expected.architecture, expected.metadata, expected.plans, weights, quant, report)


def _contract(
    run: RunFolder, name: str, merge: dict[str, Any], inputs: dict[str, str], parameters: int
) -> dict[str, Value]:
    prompts = run.prompts
    values: dict[str, Value] = {
        "general.type": "model",
        "general.name": name,
        "general.size_label": f"{parameters / 1e6:.1f}M",
        "general.license": "apache-2.0",
        "general.languages": ["zh"],
        "general.tags": ["pediatrics", "text-generation"],
        "general.description": "PediatricsGPT consultation model"
        + (", a demonstration and not for clinical use" if prompts["demonstration"] else ""),
        "general.sampling.temp": 0.0,
        "pediatricsgpt.contract": int(prompts["contract"]),
        "pediatricsgpt.system_prompt": prompts["system_prompt"],
        "pediatricsgpt.task_prompts": _compact(prompts["task_prompts"]),
        "pediatricsgpt.passage_template": prompts["passage_template"],
        "pediatricsgpt.question_template": prompts["question_template"],
        "pediatricsgpt.phrases": _compact(prompts["phrases"]),
        "pediatricsgpt.merge_method": merge["method"],
        "pediatricsgpt.merge_fidelity": _compact(merge),
        "pediatricsgpt.source_sha256": hashlib.sha256(_compact(inputs).encode()).hexdigest(),
        "pediatricsgpt.demonstration": prompts["demonstration"],
    }
    if corpus := run.run.get("corpus_sha256"):
        values["pediatricsgpt.corpus_sha256"] = str(corpus)
    return values


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _report(name: str, gates: list[Gate], merge: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    return {
        "name": name,
        "passed": all(gate.passed for gate in gates),
        "failed": [f"{gate.name} ({gate.file})" for gate in gates if not gate.passed],
        "gates": [gate.record() for gate in gates],
        "merge": merge,
        "bytes": {distribution.file_name(name, quant): path.stat().st_size for quant, path in files.items()},
    }


def _keep_report(output: Path, report: dict[str, Any]) -> Path:
    # An earlier good export keeps its own report: this one is about files that were thrown away.
    file = output / ("fidelity-failed.json" if (output / "manifest.json").exists() else "fidelity.json")
    part = file.with_name(f"{_WORK}/{file.name}")
    distribution.write_json(part, report)
    os.replace(part, file)
    return file


def _publish(output: Path, files: dict[Path, Path]) -> None:
    """Moves finished files to their final names, the checksums last; removes what an earlier export alone had."""
    for part in files.values():
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    stale = {output / name for name in _outputs(output)} - set(files)
    for name in ("SHA256SUMS", "manifest.json", "fidelity-failed.json"):
        (output / name).unlink(missing_ok=True)
    for final, part in files.items():
        os.replace(part, final)
    for file in stale:
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows cannot open a folder; there the rename is durable enough
        folder = os.open(output, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _outputs(output: Path) -> list[str]:
    try:
        names = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["outputs"]
        return [name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _refuse_overwriting(output: Path, targets: list[Path], force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise BadInput(f"{output} is a file; choose a folder with --output.")
    if force:
        return
    for path in (output / "manifest.json", *targets):
        if path.exists():
            raise BadInput(f"{output} already holds an export ({path.name}); replace it with --force or choose --output.")


def _refuse_full_disk(output: Path, parameters: int, quants: tuple[str, ...]) -> None:
    needed = int(parameters * sum(_BYTES[quant] for quant in {REFERENCE, *quants})) + _SPARE_BYTES
    free = shutil.disk_usage(output).free
    if free < needed:
        raise BadInput(
            f"The disk of {output} has {free / 2**30:.2f} GiB free, this export needs {needed / 2**30:.2f} GiB; "
            "free some space, choose another --output, or fewer --quant."
        )


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """A folder beside the final files, emptied of what a killed run left, and removed at the end."""
    created = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BadInput(f"Another export is writing to {output}; wait for it or choose another --output.") from error
    work = output / _WORK
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()
        (output / _LOCK).unlink(missing_ok=True)
        if created and not any(output.iterdir()):
            output.rmdir()


@contextlib.contextmanager
def _disk_failures(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(f"The disk of {output} is full; free some space or choose another --output.") from error
        raise BadInput(f"{output} cannot be written ({error.strerror or error}); choose another --output.") from error
    except ValueError as error:
        raise BadInput(f"The weights cannot be exported: {error}; train the run again.") from error


def _labelled(progress: Progress, label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(label, done, total)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
