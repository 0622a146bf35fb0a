"""The folder that is handed on: checksums, manifest, model card, Ollama file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantize import chat
from quantize.merging import merge_sentence
from quantize.run_folder import RunFolder, file_sha256

_PACKAGES = ("pediatricsgpt", "torch", "transformers", "peft", "gguf", "llama-cpp-python", "numpy")


@dataclass(frozen=True)
class Export:
    """What the documents of a distribution are written from. `report` is fidelity.json's content."""

    name: str
    run: RunFolder
    inputs: dict[str, str]
    files: dict[str, Path]
    report: dict[str, Any]
    chat_template: str
    eos: str
    nfc: bool
    parameters: int


def write_documents(export: Export, folder: Path) -> list[str]:
    """Writes README.md, Modelfile, fidelity.json, manifest.json and SHA256SUMS; returns their names in that order.

    The last two name every file of the distribution by sha256.
    """
    (folder / "README.md").write_text(_model_card(export), encoding="utf-8")
    (folder / "Modelfile").write_text(_modelfile(export), encoding="utf-8")
    write_json(folder / "fidelity.json", export.report)
    names = ["README.md", "Modelfile", "fidelity.json"]
    files = {path.name.removesuffix(".part"): path for path in export.files.values()}
    sums = {name: file_sha256(path) for name, path in {**files, **{n: folder / n for n in names}}.items()}
    manifest = {
        "name": export.name,
        "contract": export.run.prompts["contract"],
        "demonstration": export.run.prompts["demonstration"],
        "run": export.run.name,
        "git_commit": export.run.run.get("git_commit"),
        "corpus_sha256": export.run.run.get("corpus_sha256"),
        "merge_method": export.report["merge"]["method"],
        "inputs": export.inputs,
        "outputs": {
            name: {"sha256": digest, "bytes": (files.get(name) or folder / name).stat().st_size}
            for name, digest in sums.items()
        },
        "versions": _versions(),
    }
    write_json(folder / "manifest.json", manifest)
    sums["manifest.json"] = file_sha256(folder / "manifest.json")
    (folder / "SHA256SUMS").write_text("".join(f"{sums[n]}  {n}\n" for n in sorted(sums)), encoding="utf-8")
    return [*names, "manifest.json", "SHA256SUMS"]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Readable, deterministic JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def file_name(name: str, quant: str) -> str:
    """Name of a model file in the distribution."""
    return f"{name}-{quant}.gguf"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # the project itself, when it runs from its folder
    return found


def _modelfile(export: Export) -> str:
    first = next(iter(export.files.values()))
    system = export.run.prompts["system_prompt"] + next(iter(export.run.prompts["task_prompts"].values()))
    lines = [f"FROM ./{first.name.removesuffix('.part')}"]
    if chat.is_chatml(export.chat_template):
        lines.append(
            'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n'
            '{{ end }}<|im_start|>assistant\n"""'
        )
    else:
        lines.append("# The chat template is not ChatML; write its TEMPLATE by hand before `ollama create`.")
    lines += [f'PARAMETER stop "{export.eos}"', "PARAMETER temperature 0", f'SYSTEM """{system}"""']
    return "\n".join(lines) + "\n"


def _model_card(export: Export) -> str:
    demonstration = export.run.prompts["demonstration"]
    merge = export.report["merge"]
    rows = []
    for quant, path in export.files.items():
        gates = {gate["name"]: gate for gate in export.report["gates"] if gate["file"] == quant}
        against = "hf" if "kld_vs_hf" in gates else "f32"
        rows.append(
            (
                path.name.removesuffix(".part"),
                f"{path.stat().st_size / 2**20:.1f}",
                gates["types"]["detail"],
                f"{gates[f'kld_vs_{against}']['value']:.2g}",
                f"{gates[f'top1_vs_{against}']['value']:.2%}",
            )
        )
    warning = (
        "**This is a demonstration model. It is not for clinical use.** 这是演示模型，不能用于看病。\n\n"
        if demonstration
        else ""
    )
    nfc = "- Text must be Unicode NFC before it is tokenised; llama.cpp does not normalise it.\n" if export.nfc else ""
    return (
        "---\nlicense: apache-2.0\nlanguage:\n- zh\ntags:\n- pediatrics\n- gguf\n---\n\n"
        f"# {export.name}\n\n{warning}"
        f"A language model for paediatric consultation in Chinese, {export.parameters / 1e6:.1f} million parameters, "
        f"trained as run `{export.run.name}` of PediatricsGPT and exported to GGUF. The app reads prompts, chat "
        "template and merge figures from the file itself.\n\n"
        "## Files\n\n"
        + _table(("file", "MiB", "tensor types", "mean KLD (nats)", "same best token"), rows)
        + "\nThe F32 file is compared with the Hugging Face model, every other file with the F32 weights. "
        "Token ids, chat template and end of generation were compared too; `fidelity.json` holds every check.\n\n"
        f"## Merging the experts\n\n{merge_sentence(merge)}\n\n"
        "## Limits\n\n"
        "- Output is text from a language model; nothing in it has been checked. Numbers and doses must be taken "
        "from the cited source, not from the model.\n"
        "- It does not replace examination by a doctor. 危险信号请立即就医。\n"
        f"- The figures above were measured on fixed texts and on {merge['dialogues']} calibration dialogues of the "
        "training run, not on held-out data or patients.\n"
        f"{nfc}\n"
        "## Use\n\n"
        f"```\npediatricsgpt --model {rows[0][0]}\nollama create {export.name.lower()} -f Modelfile\n"
        "sha256sum -c SHA256SUMS\n```\n\n"
        "## Licence\n\nApache-2.0.\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
