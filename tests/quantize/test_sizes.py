"""Predicted sizes against the files that were really written, and the laptops they fit."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from random_checkpoint import blueprint, gguf
from rich.console import Console

from quantize import header, quantizer, sizes
from quantize.errors import BadInput
from quantize.sizes import Blueprint

ROOT = Path(__file__).resolve().parents[2]
# Every branch of the mixtures: more bits in some layers, grouped heads, tied or not, rows no block of 256 or 32 fits.
SHAPES: dict[str, dict[str, Any]] = {
    "deep, grouped by four, tied": {"layers": 17, "heads": 8, "key_heads": 2, "head": 32},
    "grouped by two, untied": {"layers": 16, "heads": 4, "key_heads": 2, "tied": False},
    "narrow": {"layers": 9, "hidden": 224, "heads": 7, "key_heads": 7, "head": 32, "inner": 544, "tied": False},
    "narrow and tied": {"layers": 3, "hidden": 96, "heads": 3, "key_heads": 3, "head": 32, "inner": 256},
    "odd": {"layers": 2, "hidden": 128, "heads": 4, "key_heads": 4, "head": 32, "inner": 528},
    "llama of 80 layers": {"architecture": "llama", "layers": 80, "tied": False, "vocabulary": 64},
    "baichuan": {
        "architecture": "baichuan", "layers": 32, "heads": 4, "key_heads": 4, "tied": False, "vocabulary": 64000,
        "hidden": 64, "head": 16, "inner": 160,
    },
}  # fmt: skip
# One process for all: starting one for each would take minutes.
DRY_RUNS = """
import json, sys
from quantize import child, quantizer
child.say = lambda **_: None
answers = [quantizer._work(request)["kinds"] for request in json.load(open(sys.argv[1]))]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Blueprint, Path]]:
    """Every shape's blueprint and float file."""
    folder = tmp_path_factory.mktemp("shapes")
    made = {name: blueprint(**shape) for name, shape in SHAPES.items()}
    return {name: (model, gguf(model, folder / name)) for name, model in made.items()}


def ones(model: Blueprint) -> dict[str, np.ndarray]:
    """An importance matrix that says nothing."""
    return {name: np.ones(shape[-1:], np.float32) for name, shape in model.shapes.items() if len(shape) == 2}


def test_the_mixtures_are_llama_cpps(models: dict[str, tuple[Blueprint, Path]], tmp_path: Path) -> None:
    """All types, with and without an importance matrix, against llama.cpp's own dry run."""
    cases, requests = [], []
    for name, (model, path) in models.items():
        np.savez(tmp_path / f"{name}.npz", **ones(model))  # type: ignore[arg-type]
        for quant in sizes.MIXTURES:
            for imatrix in (False, True):
                matrix = {"imatrix": str(tmp_path / f"{name}.npz")} if imatrix else {}
                request = {"source": str(path), "sizes": {}, "file_type": quantizer.FILE_TYPES[quant], "target": None}
                requests.append({**request, "overrides": {}, "recorded": {}, "threads": 1, **matrix})
                cases.append((name, model, quant, imatrix))
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    command = [sys.executable, "-c", DRY_RUNS, str(tmp_path / "requests.json")]
    answers = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    for (name, model, quant, imatrix), answer in zip(cases, answers, strict=True):
        real = {tensor: Kind[kind.upper()] for tensor, kind in answer.items()}
        kinds = sizes.mixture(model.shapes, model.architecture, model.metadata, quant, imatrix)
        # The dry run is silent about what keeps its type.
        predicted = {tensor: kind for tensor, kind in kinds.items() if tensor in real}
        assert predicted == real, (name, quant, imatrix)
        assert {kinds[tensor] for tensor in kinds.keys() - real.keys()} <= {Kind.F32}


@pytest.mark.parametrize(
    ("shape", "quant", "imatrix"),
    [("deep, grouped by four, tied", "Q4_K_M", False), ("narrow", "Q3_K_M", True), ("odd", "IQ3_XXS", True)],
)
def test_a_quantized_files_size_is_known_to_the_byte(
    shape: str, quant: str, imatrix: bool, models: dict[str, tuple[Blueprint, Path]], tmp_path: Path
) -> None:
    model, path = models[shape]
    overrides = {r"\.1\.attn_v": "Q8_0", "attn": "Q5_K"}
    recorded = {"quantize.imatrix.dataset": "儿科问诊", "quantize.imatrix.chunks_count": 8}
    given = {"overrides": overrides, "recorded": recorded}
    target = tmp_path / "q.part"
    quantizer.quantize(
        path, target, quant, tmp_path, lambda *_: None, imatrix=ones(model) if imatrix else None, **given
    )
    assert target.stat().st_size == sizes.file_bytes(model, quant, imatrix=imatrix, **given)
    real = {name: tensor.kind for name, tensor in header.read(target).tensors.items()}
    assert real == sizes.mixture(model.shapes, model.architecture, model.metadata, quant, imatrix, overrides)
    assert real["blk.1.attn_v.weight"] == Kind.Q8_0


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
def test_a_direct_files_size_is_known_to_the_byte(quant: str, tmp_path: Path) -> None:
    model = blueprint("llama", tied=False, inner=528)
    path = gguf(model, tmp_path, quant)
    assert path.stat().st_size == sizes.file_bytes(model, quant)


def test_the_disk_holds_the_intermediate_once(tmp_path: Path) -> None:
    model = blueprint()
    each = {quant: sizes.file_bytes(model, quant) for quant in ("BF16", "Q8_0", "Q4_K_M")}
    both = sizes.disk_needed(model, ["Q8_0", "Q4_K_M"], "BF16", extra=1000)
    assert both == sum(each.values()) + 1000 + (64 << 20)
    assert sizes.disk_needed(model, ["BF16", "Q4_K_M"], "BF16") == each["BF16"] + each["Q4_K_M"] + (64 << 20)
    assert sizes.disk_needed(model, ["Q8_0"], None) == each["Q8_0"] + (64 << 20)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attn_x": "Q8_0"}, "matches no matrix"),
        ({"attn_norm": "Q8_0"}, "matches no matrix"),  # a norm stays float32 whatever is asked for
        ({"attn_q": "Q9"}, "Q9 is no type"),
        ({"attn_q": "IQ1_S"}, "IQ1_S is no type"),
        ({"attn_(": "Q8_0"}, "no regular expression"),
    ],
)
def test_overrides_that_cannot_work_are_refused(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        sizes.override_types(blueprint().shapes, overrides)


def qwen3(hidden: int, layers: int, heads: int, inner: int) -> Blueprint:
    """A Qwen3 with the published vocabulary; shapes only."""
    return blueprint(hidden=hidden, layers=layers, heads=heads, key_heads=8, head=128, inner=inner, vocabulary=151_936)


def test_memory_follows_the_cache() -> None:
    """llama.cpp allocated 448 and 238 MiB of keys and values for this shape and 4,096 tokens."""
    model = qwen3(1024, 28, 16, 3072)
    rows = {row.context: row for row in sizes.needs(model, {"Q8_0": 633 << 20})}
    assert list(rows) == [2048, 4096]  # the longest context, once
    assert rows[4096].kv_f16 == 448 << 20
    assert rows[4096].kv_q8_0 == 238 << 20
    assert rows[2048].kv_f16 == 224 << 20
    assert rows[4096].total - rows[2048].total > 224 << 20
    assert rows[4096].total > rows[4096].total_q8_0 > rows[4096].weights


def test_verdicts_for_known_models() -> None:
    small, large = qwen3(2048, 28, 16, 6144), qwen3(4096, 36, 32, 12288)
    assert (small.architecture, len(small.plans)) == ("qwen3", 310)

    def at_4096(model: Blueprint, quant: str) -> int:
        return next(n for n in sizes.needs(model, {quant: sizes.file_bytes(model, quant)}) if n.context == 4096).total

    assert [sizes.verdict(at_4096(small, "Q4_K_M"), size) for size in sizes.LAPTOPS] == ["fits", "fits", "fits"]
    assert [sizes.verdict(at_4096(large, "Q4_K_M"), size) for size in sizes.LAPTOPS] == ["no", "tight", "fits"]
    assert sizes.file_bytes(small, "Q4_K_M") / 2**30 == pytest.approx(1.03, abs=0.01)


def test_the_table_says_when_only_small_keys_and_values_fit() -> None:
    need = sizes.Need("Q4_K_M", 8192, weights=1 << 30, kv_f16=2 << 30, kv_q8_0=1 << 30, other=100 << 20)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(sizes.fit_table([need]))
    row = next(line for line in console.export_text().splitlines() if "Q4_K_M" in line)
    cells = [cell.strip() for cell in row.strip("│┃").split("│")]
    assert cells == ["Q4_K_M", "1.00", "8,192", "2.00", "1.00", "3.10", "2.10", "no (Q8_0: fits)", "fits", "fits"]
