"""The whole way from a run folder to a distribution folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize import architectures, distribution, header, publishing, quantizer, tokenizer, writer
from quantize.architectures import Value
from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput
from quantize.experts import Adapter, Merge
from quantize.fidelity import REFERENCE, Expected, Fidelity, Gate
from quantize.merging import measure_merge
from quantize.reference import Reference, collect, logits_bytes
from quantize.run_folder import NAME, RunFolder

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
    if not NAME.fullmatch(name):
        raise BadInput(f"The run is called {name!r}, which makes no file name; choose one with --name.")
    output = options.output or Path("dist") / name
    targets = {quant: output / distribution.file_name(name, quant) for quant in options.quants}
    publishing.refuse_overwriting(output, list(targets.values()), options.force)
    checkpoint = Checkpoint(run.checkpoint)
    architecture = architectures.for_config(checkpoint.config)
    plans = architecture.plan(checkpoint.config)
    checkpoint.check(plans)
    adapter = Adapter(run.adapter)
    adapter.check(plans)
    vocabulary = tokenizer.read(run.checkpoint, checkpoint.config["vocab_size"])
    hyper_parameters = architecture.metadata(checkpoint.config)
    parameters = sum(math.prod(plan.shape) for plan in plans)
    with publishing.disk_failures(output), publishing.work_folder(output) as work:
        publishing.refuse_full_disk(
            output, parameters, {REFERENCE, *options.quants}, logits_bytes(len(vocabulary.tokens))
        )
        inputs = run.inputs()
        merge, merge_report, truth = _measure(run, adapter, vocabulary, options.merge, parameters, work, progress)
        expected = Expected(
            {
                **hyper_parameters,
                **vocabulary.metadata(),
                **_contract(run, name, merge_report, inputs, parameters),
            },
            architecture.NAME,
            plans,
            vocabulary,
        )
        weights = writer.Weights(checkpoint.tensors, merge)
        by_name = {plan.name: plan for plan in plans}
        fidelity = Fidelity(truth, expected, work)
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
            return Result(output, publishing.keep_report(output, report), report)
        made = distribution.Export(
            name,
            run,
            inputs,
            wanted,
            report,
            vocabulary.chat_template,
            vocabulary.tokens[vocabulary.eos],
            vocabulary.nfc,
            parameters,
        )
        documents = distribution.write_documents(made, work)
        publishing.publish(
            output,
            {targets[q]: path for q, path in wanted.items()} | {output / d: work / d for d in documents},
        )
        return Result(output, output / "fidelity.json", report)


def _measure(
    run: RunFolder,
    adapter: Adapter,
    vocabulary: tokenizer.Vocabulary,
    method: str,
    parameters: int,
    work: Path,
    progress: Progress,
) -> tuple[Merge, dict[str, Any], Reference]:
    """The part that needs torch: gates, cost of merging, and the outputs every file is compared with."""
    from quantize.live import Live, suitable_threads

    progress("Loading the live model", 0, 1)
    with suitable_threads(parameters):
        live = Live(run.checkpoint, run.adapter)
        progress("Loading the live model", 1, 1)
        merge, report = measure_merge(live, adapter, run, method, progress)
        truth = collect(live, run, vocabulary, work / "hf", _labelled(progress, "Running the reference"))
    return merge, report, truth


def _make(
    path: Path,
    quant: str,
    reference: Path,
    expected: Expected,
    weights: writer.Weights,
    work: Path,
    progress: Progress,
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


def _labelled(progress: Progress, label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(label, done, total)
