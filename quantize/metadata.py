"""What a GGUF says about itself beyond tensors and vocabulary: the contract with the app, and general.*."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from quantize.architectures import Value
from quantize.distribution.origin import Origin
from quantize.fidelity import KEY, RESERVED_BYTES
from quantize.prepare import Prepared
from quantize.sizes import Blueprint

SOURCE = "pediatricsgpt.source_sha256"


def metadata(prepared: Prepared, method: str | None, merge: dict[str, Any] | None) -> dict[str, Value]:
    """Every key of the file but the tensors' types; the source's digest is put in later (`source_digest`).

    method: how an adapter was merged, and `merge` what that cost.
    A model that is not ours gets no prompts: the app then takes its built-in ones and says so.
    """
    source = prepared.source
    values: dict[str, Value] = {
        "general.type": "model",
        "general.name": prepared.name,
        "general.size_label": size_label(prepared.parameters),
        "general.description": _description(prepared),
        "general.license": Origin.of(source).licence,
        "general.quantized_by": "PediatricsGPT",
        SOURCE: "0" * 64,
    }
    if method is not None:
        values["pediatricsgpt.merge_method"] = method
    if merge is not None:
        values["pediatricsgpt.merge_fidelity"] = _compact({k: v for k, v in merge.items() if k != "table"})
    if source.prompts is not None:
        values |= {
            "general.languages": ["zh"],
            "general.tags": ["pediatrics", "text-generation"],
            "general.sampling.temp": 0.0,
            "pediatricsgpt.contract": int(source.prompts["contract"]),
            "pediatricsgpt.system_prompt": source.prompts["system_prompt"],
            "pediatricsgpt.task_prompts": _compact(source.prompts["task_prompts"]),
            "pediatricsgpt.passage_template": source.prompts["passage_template"],
            "pediatricsgpt.question_template": source.prompts["question_template"],
            "pediatricsgpt.phrases": _compact(source.prompts["phrases"]),
            "pediatricsgpt.demonstration": source.demonstration,
        }
    if corpus := source.run.get("corpus_sha256"):
        values["pediatricsgpt.corpus_sha256"] = str(corpus)
    return {**prepared.hyper_parameters, **prepared.vocabulary.metadata(), **values}


def source_digest(inputs: dict[str, str]) -> str:
    """What a file says under `SOURCE` of the source's files; `inputs`: their sha256."""
    return hashlib.sha256(_compact(inputs).encode()).hexdigest()


def draft(prepared: Prepared, method: str | None) -> Blueprint:
    """The file as far as it is known before anything is measured: enough for its size, but for some kilobytes."""
    values = {**metadata(prepared, method, None), KEY: " " * RESERVED_BYTES}
    return Blueprint(prepared.architecture, values, prepared.plans)


def size_label(parameters: int) -> str:
    """Millions or billions of parameters, as model names write them."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _description(prepared: Prepared) -> str:
    if prepared.source.prompts is None:
        return f"{prepared.name}, converted by PediatricsGPT; not one of its own models"
    warning = ", a demonstration and not for clinical use" if prepared.source.demonstration else ""
    return f"PediatricsGPT consultation model{warning}"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
