"""Files written in row blocks: right bytes, right order, whatever the blocks and threads; nothing not finite."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from random_checkpoint import blueprint, plan_named, tensors
from safetensors.torch import load_file, save_file

from quantize import header, writer
from quantize.architectures import TensorPlan
from quantize.checkpoint import Tensors
from quantize.errors import BadInput
from quantize.sizes import Blueprint

_NUMPY = {"F32": np.float32, "F16": np.float16}


class LowRank:
    """A merge of one module, in the source's row order."""

    def __init__(self, module: str, delta: np.ndarray) -> None:
        self.module, self.delta = module, delta

    def delta_rows(self, module: str, rows: slice | np.ndarray) -> np.ndarray | None:
        return self.delta[rows] if module == self.module else None


def written(model: Blueprint, folder: Path, quant: str, merge: Any = None, **options: Any) -> header.Header:
    path = folder / f"{quant}.part"
    weights = writer.Weights(Tensors([folder / "model.safetensors"]), merge)
    writer.write(
        path, model.architecture, model.metadata, model.plans, weights, quant, lambda *_: None, sync=False, **options
    )
    return header.read(path)


def stored(head: header.Header, name: str) -> np.ndarray:
    tensor = head.tensors[name]
    return np.fromfile(head.path, np.uint8, tensor.nbytes, offset=tensor.offset)


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_holds_the_source_encoded(
    quant: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_BLOCK_ELEMENTS", 5000)  # many blocks a tensor, the last one short
    model = blueprint()
    source = tensors(model, tmp_path, dtype)
    head = written(model, tmp_path, quant, threads=3)
    assert list(head.tensors) == [plan.name for plan in model.plans]
    for plan in model.plans:
        rows = source[plan.source].float().numpy()
        kind = Kind[quant] if plan.is_matrix else Kind.F32
        assert head.tensors[plan.name].kind == kind
        expected = gguf.quants.quantize(rows, kind).view(np.uint8).ravel()
        assert np.array_equal(stored(head, plan.name), expected), plan.name


@pytest.mark.parametrize(("dtype", "quant"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_rows_of_the_files_own_type_are_copied_not_computed(
    dtype: torch.dtype, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permuted ones too. What is merged must not be copied."""
    computed: list[int] = []
    encode = writer.encode

    def counted(rows: np.ndarray, kind: Kind) -> np.ndarray:
        if rows.ndim > 1:
            computed.append(rows.shape[0])
        return encode(rows, kind)

    monkeypatch.setattr(writer, "encode", counted)
    model = blueprint("llama", tied=False)
    source = tensors(model, tmp_path, dtype)
    head = written(model, tmp_path, quant)
    assert computed == []
    query = plan_named(model, "blk.1.attn_q.weight")
    assert query.order is not None
    bits = source[query.source].view(torch.int16 if quant != "F32" else torch.int32).numpy()[query.order]
    assert np.array_equal(stored(head, query.name), np.ascontiguousarray(bits).view(np.uint8).ravel())
    merge = LowRank(query.source.removesuffix(".weight"), np.ones(query.shape, np.float32))
    written(model, tmp_path, quant, merge)
    assert computed == [query.shape[0]]


@pytest.mark.parametrize("blocks", [300, 1 << 20])
def test_a_merge_is_added_in_the_sources_row_order(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_BLOCK_ELEMENTS", blocks)
    model = blueprint("llama", tied=False)
    source = tensors(model, tmp_path)
    plan = plan_named(model, "blk.0.attn_k.weight")
    delta = np.random.default_rng(0).standard_normal(plan.shape).astype(np.float32)
    head = written(model, tmp_path, "F32", LowRank(plan.source.removesuffix(".weight"), delta))
    expected = (source[plan.source].float().numpy() + delta)[plan.order]
    assert np.array_equal(stored(head, plan.name), expected.view(np.uint8).ravel())
    other = plan_named(model, "blk.1.attn_k.weight")
    assert np.array_equal(
        stored(head, other.name).view(np.float32), source[other.source].float().numpy()[other.order].ravel()
    )


def test_unit_rows_are_divided_after_the_merge_and_zeros_stay_zeros(tmp_path: Path) -> None:
    plan = TensorPlan("output.weight", "lm_head.weight", (4, 32), unit_rows=True)
    values = torch.randn(4, 32)
    values[2] = 0
    save_file({"lm_head.weight": values}, tmp_path / "model.safetensors")
    delta = np.full((4, 32), 0.5, np.float32)
    delta[2] = 0
    weights = writer.Weights(Tensors([tmp_path / "model.safetensors"]), LowRank("lm_head", delta))
    expected = torch.nn.functional.normalize(values + torch.from_numpy(delta)).numpy()
    assert np.allclose(weights.rows(plan, 0, 4), expected, atol=1e-7)
    assert weights.stored(plan, Kind.F32) is None


def test_computed_tensors_come_from_the_plan(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    model = blueprint()
    model = Blueprint(
        model.architecture, model.metadata, [*model.plans, TensorPlan("rope_freqs.weight", "", (32,), values=factors)]
    )
    tensors(blueprint(), tmp_path)
    head = written(model, tmp_path, "Q8_0")
    assert np.array_equal(stored(head, "rope_freqs.weight").view(np.float32), factors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("dtype", "quant"),
    [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32"), (torch.bfloat16, "Q8_0")],
)
def test_weights_that_are_not_finite_are_refused_by_name(
    bad: float, dtype: torch.dtype, quant: str, tmp_path: Path
) -> None:
    """On the way that encodes and on the one that copies."""
    model = blueprint()
    values = tensors(model, tmp_path, dtype)
    values["model.layers.1.mlp.up_proj.weight"][17, 3] = bad
    save_file(values, tmp_path / "model.safetensors")
    before = threading.active_count()
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        written(model, tmp_path, quant)
    assert threading.active_count() <= before + 1  # the pool is shut down; a last task may be ending


@pytest.mark.parametrize(("quant", "value"), [("F16", 70000.0), ("Q8_0", 1e7), ("F16", -70000.0)])
def test_values_too_large_for_the_type_are_refused(quant: str, value: float, tmp_path: Path) -> None:
    model = blueprint()
    values = tensors(model, tmp_path)
    values["model.layers.0.mlp.down_proj.weight"][1, 1] = value
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=rf"down_proj\.weight holds .* too large for {quant}; choose --quant BF16"):
        written(model, tmp_path, quant)
    written(model, tmp_path, "BF16")


def test_rows_that_no_block_fits_take_f16(tmp_path: Path) -> None:
    model = blueprint(inner=528)  # 16 more than a multiple of 32
    tensors(model, tmp_path)
    head = written(model, tmp_path, "Q8_0")
    assert head.tensors["blk.0.ffn_down.weight"].kind == Kind.F16
    assert head.tensors["blk.0.ffn_up.weight"].kind == Kind.Q8_0


@pytest.mark.parametrize("blocks", [400, 1 << 20])
def test_the_same_bytes_whatever_the_blocks_and_threads(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = blueprint()
    tensors(model, tmp_path)
    reference = written(model, tmp_path, "Q8_0", threads=1).path.read_bytes()
    monkeypatch.setattr(writer, "_BLOCK_ELEMENTS", blocks)
    for threads in (1, 2, 7):
        assert written(model, tmp_path, "Q8_0", threads=threads).path.read_bytes() == reference


def test_only_a_few_blocks_wait_while_the_disk_is_slow() -> None:
    started: list[int] = []

    def task(number: int) -> Callable[[], tuple[str, np.ndarray]]:
        def run() -> tuple[str, np.ndarray]:
            started.append(number)
            return str(number), np.zeros(1, np.uint8)

        return run

    results = writer._in_order((task(number) for number in range(1000)), 2)
    assert next(results)[0] == "0"
    results.close()
    assert len(started) <= 6


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    model = blueprint()
    tensors(model, tmp_path)
    weights = writer.Weights(Tensors([tmp_path / "model.safetensors"]), None)
    seen: list[tuple[int, int]] = []
    path = tmp_path / "x.part"
    writer.write(
        path, model.architecture, model.metadata, model.plans, weights, "BF16", lambda *s: seen.append(s), sync=False
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in header.read(path).tensors.values())


def test_the_header_is_what_ggufs_own_writer_writes(tmp_path: Path) -> None:
    model = blueprint("llama", tied=False)
    metadata = {
        **model.metadata,
        "general.name": "名字 with 'quotes'\n",
        "general.tags": ["one", "二"],
        "tokenizer.ggml.token_type": [1, 3, -2],
        "tokenizer.ggml.scores": [0.5, -1000.0],
        "pediatricsgpt.demonstration": True,
        "tokenizer.ggml.add_bos_token": False,
    }
    kinds = [writer.tensor_type(plan, "Q8_0") for plan in model.plans]
    own = gguf.GGUFWriter(tmp_path / "own.gguf", "llama")
    for key, value in metadata.items():
        match value:
            case bool():
                own.add_bool(key, value)
            case int():
                own.add_uint32(key, value)
            case float():
                own.add_float32(key, value)
            case str():
                own.add_string(key, value)
            case _:
                own.add_array(key, value)
    own.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    own.add_quantization_version(2)
    for plan, kind in zip(model.plans, kinds, strict=True):
        size = writer.tensor_bytes(plan.shape, kind)
        own.add_tensor_info(plan.name, plan.shape, np.dtype(np.float32), size, raw_dtype=kind)
    own.write_header_to_file()
    own.write_kv_data_to_file()
    own.write_ti_data_to_file()
    own.close()
    expected = (tmp_path / "own.gguf").read_bytes()
    made = writer.header_bytes("llama", metadata, model.plans, kinds, gguf.LlamaFileType.MOSTLY_Q8_0)
    assert made == expected.ljust(writer.padded(len(expected)), b"\0")
    assert len(made) % 32 == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("a", ""), ("a", []), ("a", -1), ("a", 2**32), ("a", ["x", 1]), ("a", [2**31]), ("a", [1, True])],
)
def test_values_that_a_gguf_cannot_hold_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match="a "):
        writer.header_bytes("llama", {key: value}, [], [], 0)


def test_a_name_too_long_for_ggml_is_refused() -> None:
    plan = TensorPlan("x" * 64, "x", (1,))
    with pytest.raises(ValueError, match="longer than 63"):
        writer.header_bytes("llama", {}, [plan], [Kind.F32], 0)


def test_the_source_is_never_changed(tmp_path: Path) -> None:
    """The checkpoint is mapped into memory; adding a merge in place must not reach it."""
    model = blueprint()
    before = {name: value.clone() for name, value in tensors(model, tmp_path, torch.float32).items()}
    plan = plan_named(model, "blk.0.ffn_up.weight")
    written(model, tmp_path, "F32", LowRank(plan.source.removesuffix(".weight"), np.ones(plan.shape, np.float32)))
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
