"""How large every file will be, to the byte and before it is written, and which laptop can hold it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from rich.table import Table

from quantize.architectures import TensorPlan, Value
from quantize.errors import BadInput
from quantize.writer import DIRECT, header_bytes, padded, tensor_bytes, tensor_type

Shapes = Mapping[str, tuple[int, ...]]  # of the tensors by GGUF name, numpy order

# What llama.cpp's own quantizer makes: (enum llama_ftype, the type of most tensors).
MIXTURES = {
    "Q4_0": (2, Kind.Q4_0),
    "Q5_0": (8, Kind.Q5_0),
    "Q3_K_M": (12, Kind.Q3_K),
    "Q4_K_S": (14, Kind.Q4_K),
    "Q4_K_M": (15, Kind.Q4_K),
    "Q5_K_S": (16, Kind.Q5_K),
    "Q5_K_M": (17, Kind.Q5_K),
    "Q6_K": (18, Kind.Q6_K),
    "IQ3_XXS": (23, Kind.IQ3_XXS),
    "IQ4_NL": (25, Kind.IQ4_NL),
    "IQ4_XS": (30, Kind.IQ4_XS),
}
# llama.cpp refuses to make these without an importance matrix, except for EXEMPT.
NEED_IMATRIX = frozenset({Kind.IQ3_XXS, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ1_S, Kind.IQ1_M})
EXEMPT = ("token_embd.weight", "output.weight")
_OVERRIDES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S",
)  # fmt: skip
_FALLBACK = {
    Kind.Q2_K: Kind.Q4_0,
    Kind.Q3_K: Kind.Q4_0,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
    **dict.fromkeys((Kind.IQ4_XS, Kind.IQ3_S, *NEED_IMATRIX), Kind.IQ4_NL),
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")

LAPTOPS = (4, 8, 16)  # GB of memory
CONTEXTS = (2048, 4096, 8192)
# Of a laptop's memory: the system and a browser take the rest, and beyond the second limit it swaps.
_FITS, _TIGHT = 0.55, 0.75
_MICRO_BATCH = 128  # tokens per graph in the app (tui/engine/llama.py)
_VOCABULARY_BYTES = 300  # per token, measured with the Qwen vocabulary
_PROGRAM_BYTES = 120 << 20  # the app and its engine process without a model
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Blueprint:
    """What a file is made from, without its weights: enough for every size."""

    architecture: str
    metadata: Mapping[str, Value]
    plans: Sequence[TensorPlan]

    @property
    def shapes(self) -> Shapes:
        return {plan.name: plan.shape for plan in self.plans}


@dataclass(frozen=True)
class Need:
    """The memory, in bytes, that one file needs with one context, its keys and values kept as F16 or as Q8_0."""

    quant: str
    context: int
    weights: int
    kv_f16: int
    kv_q8_0: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_f16 + self.other

    @property
    def total_q8_0(self) -> int:
        return self.weights + self.kv_q8_0 + self.other


def file_bytes(
    model: Blueprint,
    quant: str,
    *,
    imatrix: bool = False,
    overrides: Mapping[str, str] | None = None,
    recorded: Mapping[str, str | int] | None = None,
) -> int:
    """The size of a finished file. `imatrix` says whether there is one, `recorded` what is added to the metadata.

    Raises BadInput for overrides that fit no tensor.
    """
    if quant in DIRECT:
        kinds, file_type = {plan.name: tensor_type(plan, quant) for plan in model.plans}, int(DIRECT[quant])
    else:
        kinds = mixture(model.shapes, model.architecture, model.metadata, quant, imatrix, overrides)
        file_type = MIXTURES[quant][0]
    ordered = [kinds[plan.name] for plan in model.plans]
    metadata = {**model.metadata, **(recorded or {})}
    tensors = sum(padded(tensor_bytes(plan.shape, kind)) for plan, kind in zip(model.plans, ordered, strict=True))
    return len(header_bytes(model.architecture, metadata, model.plans, ordered, file_type)) + tensors


def disk_needed(model: Blueprint, quants: Iterable[str], intermediate: str | None, extra: int = 0) -> int:
    """Free bytes an export needs: all its files at once, the float file they are made from, `extra` (adapters,
    logits), and something to spare."""
    files = {*quants} | ({intermediate} if intermediate else set())
    return sum(file_bytes(model, quant) for quant in files) + extra + _SPARE_BYTES


def mixture(
    shapes: Shapes,
    architecture: str,
    metadata: Mapping[str, Any],
    quant: str,
    imatrix: bool,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Kind]:
    """The type llama.cpp's quantizer gives each tensor, float32 for what it leaves alone.

    The rules are those of `llama_tensor_get_type` in llama-quant.cpp for the dense architectures exported here; a test
    compares them with what the quantizer really wrote. `metadata` holds the head and layer counts.
    """
    forced = override_types(shapes, overrides or {})
    heads = _count(metadata, architecture, "attention.head_count")
    shared = heads // _count(metadata, architecture, "attention.head_count_kv", heads)
    layers = _count(metadata, architecture, "block_count")
    tied = "output.weight" not in shapes
    kinds = {}
    for name, shape in shapes.items():
        if not _quantizable(name, shape):
            kinds[name] = Kind.F32
            continue
        if name in forced:
            kind = forced[name]
        elif name == "output.weight" or (tied and name == "token_embd.weight"):
            kind = _output_kind(quant, shape[-1])
        elif name == "token_embd.weight":
            kind = Kind.IQ3_S if quant == "IQ3_XXS" else MIXTURES[quant][1]
        else:
            match = _LAYER.fullmatch(name)
            if match is None:
                raise ValueError(f"no rule for the tensor {name}")
            kind = _layer_kind(quant, match[2], int(match[1]), layers, shared, imatrix)
            # llama.cpp knows a model of 70 billion by its depth and gives the values that 8 heads share more bits.
            large = architecture == "llama" and layers == 80 and shared > 1
            if large and match[2] == "attn_v" and kind in (Kind.Q3_K, Kind.Q4_K):
                kind = Kind.Q5_K
        kinds[name] = _fitting(kind, shape[-1])
    return kinds


def override_types(shapes: Shapes, overrides: Mapping[str, str]) -> dict[str, Kind]:
    """Overrides {regular expression: type} as the type of each tensor; the first that matches holds.

    Raises BadInput for a type that cannot be made and for an expression that is wrong or matches no matrix.
    """
    matrices = [name for name, shape in shapes.items() if _quantizable(name, shape)]
    found: dict[str, Kind] = {}
    for pattern, kind in overrides.items():
        if kind not in _OVERRIDES:
            raise BadInput(f"{kind} is no type for a tensor; choose one of {', '.join(_OVERRIDES)}.")
        try:
            matched = [name for name in matrices if re.search(pattern, name)]
        except re.error as error:
            raise BadInput(f"{pattern!r} is no regular expression ({error}).") from error
        if not matched:
            raise BadInput(
                f"{pattern!r} matches no matrix of the model; its matrices are called {matrices[-1]} and so on."
            )
        for name in matched:
            found.setdefault(name, Kind[kind])
    return found


def needs(model: Blueprint, files: Mapping[str, int]) -> list[Need]:
    """The memory of every file (type → bytes) with each usual context and the longest the model was trained for."""
    return [
        Need(
            quant,
            context,
            nbytes,
            _kv_bytes(model, context, Kind.F16),
            _kv_bytes(model, context, Kind.Q8_0),
            _other(model, context),
        )
        for quant, nbytes in files.items()
        for context in _contexts(model)
    ]


def verdict(nbytes: int, gigabytes: int) -> str:
    """Whether a laptop with this much memory holds it: fits, tight or no."""
    share = nbytes / (gigabytes << 30)
    return "fits" if share <= _FITS else "tight" if share <= _TIGHT else "no"


def fit_table(rows: Sequence[Need]) -> Table:
    """The needs as a table for a person; a verdict that Q8_0 keys and values would better is given too."""
    table = Table(title="Which laptop", title_justify="left")
    table.add_column("type", no_wrap=True)
    for column in ("file", "context", "KV F16", "Q8_0", "memory F16", "Q8_0", *(f"{size} GB" for size in LAPTOPS)):
        table.add_column(column, justify="right")
    before = ""
    for row in rows:
        file = ("", "") if row.quant == before else (row.quant, _gib(row.weights))
        verdicts = [_both(verdict(row.total, size), verdict(row.total_q8_0, size)) for size in LAPTOPS]
        figures = (row.kv_f16, row.kv_q8_0, row.total, row.total_q8_0)
        table.add_row(*file, f"{row.context:,}", *map(_gib, figures), *verdicts)
        before = row.quant
    table.caption = (
        f"GiB. fits: up to {_FITS:.0%} of the memory, tight: up to {_TIGHT:.0%}; "
        "“Q8_0: …”: only with keys and values kept as Q8_0."
    )
    return table


def _quantizable(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not name.endswith("_norm.weight")


def _fitting(kind: Kind, columns: int) -> Kind:
    if columns % GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    smaller = _FALLBACK.get(kind, kind)
    return smaller if columns % GGML_QUANT_SIZES[smaller][0] == 0 else Kind.F16


def _output_kind(quant: str, columns: int) -> Kind:
    if columns % GGML_QUANT_SIZES[MIXTURES[quant][1]][0]:
        return Kind.Q8_0
    return Kind.Q5_K if quant == "IQ3_XXS" else Kind.Q6_K


def _layer_kind(quant: str, part: str, layer: int, layers: int, shared: int, imatrix: bool) -> Kind:
    """`shared`: how many query heads share a key head."""
    first_eighth = layer < layers // 8
    more_bits = first_eighth or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    base = MIXTURES[quant][1]
    if part in ("attn_v", "ffn_down") and quant in ("Q4_K_M", "Q5_K_M"):
        return Kind.Q6_K if more_bits else base
    match quant, part:
        case "Q3_K_M", "attn_v":
            return Kind.Q5_K if layer < 2 else Kind.Q4_K
        case "Q3_K_M", "ffn_down":
            return Kind.Q5_K if layer < layers // 16 else Kind.Q4_K
        case "Q3_K_M", "attn_output":
            return Kind.Q4_K
        case "Q4_K_S", "attn_v":
            return Kind.Q5_K if layer < 4 else base
        case "Q4_K_S", "ffn_down":
            return Kind.Q5_K if first_eighth else base
        case (("IQ4_XS" | "IQ4_NL"), "attn_v"):
            return Kind.Q5_K if shared >= 4 else base
        case (("IQ4_XS" | "IQ4_NL"), "ffn_down"):
            return Kind.Q5_K if first_eighth and not imatrix else base
        case "Q4_0", "ffn_down":
            return Kind.Q4_1 if first_eighth and imatrix else base
        case "Q5_0", "ffn_down":
            return Kind.Q5_1 if first_eighth and imatrix else base
        case "IQ3_XXS", "attn_v":
            return Kind.Q4_K if shared >= 4 else Kind.IQ3_XXS if imatrix else Kind.IQ3_S
        case "IQ3_XXS", ("attn_q" | "attn_k"):
            return Kind.IQ2_S
        case "IQ3_XXS", "attn_output":
            return Kind.IQ3_S
        case "IQ3_XXS", "ffn_down" if not imatrix:
            return Kind.Q4_K if first_eighth else Kind.Q3_K
    return base


def _contexts(model: Blueprint) -> list[int]:
    longest = _count(model.metadata, model.architecture, "context_length")
    return [context for context in CONTEXTS if context < longest] + [longest]


def _kv_bytes(model: Blueprint, context: int, kind: Kind) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    count = partial(_count, model.metadata, model.architecture)
    heads = count("attention.head_count")
    head = count("embedding_length") // heads
    width = count("attention.key_length", head) + count("attention.value_length", head)
    rows = math.ceil(context / 256) * 256  # llama.cpp rounds up
    return rows * count("block_count") * count("attention.head_count_kv", heads) * width * size // block


def _other(model: Blueprint, context: int) -> int:
    """The graph's buffer, logits, vocabulary and programs; the buffer's form was measured with flash attention on."""
    count = partial(_count, model.metadata, model.architecture)
    width = 4 * count("feed_forward_length") + count("embedding_length")
    graph = _MICRO_BATCH * (4 * width + 2 * context)
    return graph + model.shapes["token_embd.weight"][0] * (4 + _VOCABULARY_BYTES) + _PROGRAM_BYTES


def _count(metadata: Mapping[str, Any], architecture: str, key: str, default: int | None = None) -> int:
    value = metadata.get(f"{architecture}.{key}", default)
    if not isinstance(value, int) or value <= 0:
        raise BadInput(f"The model's metadata lacks {architecture}.{key} as a positive number; export it again.")
    return value


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}"


def _both(f16: str, q8_0: str) -> str:
    return f16 if f16 == q8_0 else f"{f16} (Q8_0: {q8_0})"
