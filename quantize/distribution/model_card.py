"""README.md: a Hugging Face model card whose every figure was measured by this export, or says that it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from quantize.distribution.origin import UNKNOWN, Origin
from quantize.merging.table import merge_rows, merge_sentence
from quantize.sizes import LAPTOPS, Need, verdict

if TYPE_CHECKING:
    from quantize.distribution import Export

# Columns of the fidelity table: head, beginning of the gate's name, how its value is written.
_FIGURES = (
    ("mean KLD (nats)", "kld_vs_", ".2g"),
    ("99 % KLD", "kld99_vs_", ".2g"),
    ("same best token", "top1_vs_", ".2%"),
    ("perplexity ratio", "perplexity_vs_", ".4f"),
)


# What `--check` held the files against.
_COMPARED = {
    "full": "The unquantized file was compared with the Hugging Face model, every other file with the unquantized "
    "weights.",
    "file": "Every file was compared with the unquantized weights in llama.cpp; none with the Hugging Face model.",
    "quick": "What the model computes was not compared with anything.",
}


@dataclass(frozen=True)
class CardFile:
    """A file as the card lists it."""

    name: str
    size: int


def model_card(export: Export, models: Mapping[str, CardFile], adapters: Mapping[str, CardFile]) -> str:
    """The whole card. `models`: quant → file; `adapters`: task → file."""
    origin = Origin.of(export.source)
    parts = [
        _head(export, origin),
        f"# {export.name}\n",
        *([_WARNING] if export.source.demonstration else []),
        _introduction(export, origin),
        "## Files\n",
        _files(export, models),
        *(_adapters(adapters) if adapters else []),
        *(_fit(export.fit) if export.fit else []),
        *_merging(export.report.get("merge")),
        "## Limits\n",
        _limits(export),
        "## Use\n",
        _use(export, next(iter(models.values())).name),
        "## Verify\n",
        _VERIFY,
        f"## Licence\n\n{origin.sentence()}\n",
    ]
    return "\n".join(parts)


_WARNING = (
    "> **This is a demonstration model. It is not for clinical use:** its answers must not guide any treatment.\n"
    ">\n"
    "> **这是演示模型，不能用于看病：**它的回答不得作为任何诊疗的依据。孩子不适请就医。\n"
)
_VERIFY = (
    "```\nsha256sum -c SHA256SUMS\npediatricsgpt verify FILE.gguf\n```\n\n"
    "`SHA256SUMS` covers every file, also those in subfolders; `manifest.json` names what went in and what came out; "
    "`fidelity.json` holds every check. `pediatricsgpt pull` compares the checksums before a file gets its name.\n"
)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns in which no row has anything are left out."""
    used = [n for n in range(len(head)) if any(row[n] not in ("", "–") for row in rows)]
    lines = [[cells[n] for n in used] for cells in (head, ["---"] * len(head), *rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _head(export: Export, origin: Origin) -> str:
    trained = export.source.prompts is not None
    tags = ["gguf", "llama.cpp", *(["pediatrics", "medical"] if trained else [])]
    values = {
        "license": origin.licence,
        "license_name": origin.licence_name,
        "license_link": origin.licence_link,
        "language": list(origin.languages),
        "base_model": list(origin.base_models),
        "datasets": list(origin.datasets),
        "library_name": "llama.cpp",
        "pipeline_tag": "text-generation",
        "tags": tags,
        "quantized_by": "PediatricsGPT",
    }
    head = yaml.safe_dump({k: v for k, v in values.items() if v}, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n"


def _introduction(export: Export, origin: Origin) -> str:
    size = f"{export.parameters / 1e6:.1f} million parameters"
    if export.source.prompts is None:
        return f"{export.name}, {size}, converted to GGUF by PediatricsGPT; it is not one of its own models.\n"
    base = f", from {origin.base}," if origin.base else ""
    corpus = export.source.run.get("corpus_sha256")
    trained_on = f" The training corpus has the sha256 `{corpus}`." if corpus else ""
    return (
        f"A language model for paediatric consultation in Chinese, {size}, trained{base} as run "
        f"`{export.source.name}` of PediatricsGPT and exported to GGUF. The app reads prompts, chat template and merge "
        f"figures from the file itself.{trained_on}\n"
    )


def _files(export: Export, models: Mapping[str, CardFile]) -> str:
    rows = []
    for quant, file in models.items():
        gates = [gate for gate in export.report["gates"] if gate["file"] == quant]
        types = next((gate["detail"] for gate in gates if gate["name"] == "types"), "–")
        figures = [_figure(gates, name, style) for _, name, style in _FIGURES]
        rows.append((f"`{file.name}`", f"{file.size / 2**20:.1f}", types, *figures))
    head = ("file", "MiB", "tensor types", *(name for name, _, _ in _FIGURES))
    return (
        table(head, rows)
        + f"\n{_COMPARED[export.report['check']]} Token ids, chat template and end of generation were checked; "
        "`fidelity.json` holds every check.\n"
    )


def _figure(gates: Sequence[Mapping[str, Any]], name: str, style: str) -> str:
    value = next((gate["value"] for gate in gates if gate["name"].startswith(name)), None)
    return "–" if value is None else format(value, style)


def _adapters(adapters: Mapping[str, CardFile]) -> list[str]:
    rows = [(task, f"`{file.name}`", f"{file.size / 2**20:.1f}") for task, file in adapters.items()]
    first = next(iter(adapters.values())).name
    return [
        "## Task adapters\n",
        table(("consultation task", "file", "MiB"), rows),
        "The model file holds the best compromise of the experts for all tasks. An adapter holds what is best for one "
        f"task; load one at most, at scale 1, over the model file: `llama-cli --lora {first} …`, or the commented "
        "line of `Modelfile`.\n",
    ]


def _fit(needs: Sequence[Need]) -> list[str]:
    head = ("type", "context", "memory (GiB)", "with Q8_0 cache", *(f"{size} GB laptop" for size in LAPTOPS))
    rows = [
        (
            need.quant,
            f"{need.context:,}",
            f"{need.total / 2**30:.2f}",
            f"{need.total_q8_0 / 2**30:.2f}",
            *(verdict(need.total, size) for size in LAPTOPS),
        )
        for need in needs
    ]
    note = "Computed from the shapes of the weights, keys and values; not measured on such computers.\n"
    return ["## Which computer it fits\n", table(head, rows), note]


def _merging(merge: Mapping[str, Any] | None) -> list[str]:
    if not merge:
        return []
    parts = ["## Merging the experts\n", f"{merge_sentence(dict(merge))}\n"]
    if merge.get("table"):
        head, *rows = merge_rows(dict(merge))
        parts.append(table(head, rows))
    return parts


def _limits(export: Export) -> str:
    merge, lines = export.report.get("merge") or {}, []
    lines.append(
        "Output is text from a language model; nothing in it has been checked. Numbers and doses must be taken from "
        "the cited source, not from the model."
    )
    lines.append("It does not replace examination by a doctor. 危险信号请立即就医。")
    texts = [] if export.report["check"] == "quick" else ["fixed texts"]
    texts += [f"{merge['dialogues']} {merge['measured_on']}"] if merge else []
    if texts:
        lines.append(f"The figures above were measured on {' and on '.join(texts)}, not on patients.")
    if export.vocabulary.nfc:
        lines.append("Text must be Unicode NFC before it is tokenised; llama.cpp does not normalise it.")
    return "".join(f"- {line}\n" for line in lines)


def _use(export: Export, first: str) -> str:
    return f"```\npediatricsgpt --model {first}\nollama create {export.name.lower()} -f Modelfile\n```\n"


def licence_is_unknown(card: str) -> bool:
    """Whether a card still says that nobody stated the licence."""
    return f"license: {UNKNOWN}\n" in card
