"""llama.cpp's quantizer in its child: settings reach it, progress is real work, failures leave nothing behind."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from random_checkpoint import blueprint, gguf

from quantize import child, header, quantizer
from quantize.encode import encode
from quantize.errors import BadInput
from quantize.sizes import Blueprint

MODEL = blueprint(layers=2, tied=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 file. Read only."""
    return gguf(MODEL, tmp_path_factory.mktemp("float"))


def importance(model: Blueprint, seed: int = 0) -> dict[str, np.ndarray]:
    """A matrix of very unequal columns for every layer."""
    random = np.random.default_rng(seed)
    return {
        name: random.exponential(size=shape[-1]).astype(np.float32) ** 3
        for name, shape in model.shapes.items()
        if len(shape) == 2 and name.startswith("blk.")
    }


def quantize(source: Path, folder: Path, quant: str = "Q4_K_M", **options: Any) -> tuple[Path, list[tuple[int, int]]]:
    target, seen = folder / f"{quant}.part", []
    quantizer.quantize(source, target, quant, folder, lambda *step: seen.append(step), **options)
    return target, seen


def test_settings_reach_llama_cpp(source: Path, tmp_path: Path) -> None:
    """The matrix is used: every tensor equals ggml's own encoding with that tensor's weights, to the byte."""
    matrix = importance(MODEL)
    recorded = {"quantize.imatrix.dataset": "问诊 <train>", "quantize.imatrix.entries_count": len(matrix)}
    overrides = {r"blk\.0\.ffn_(up|gate)": "Q8_0", "ffn_up": "Q5_0"}
    target, seen = quantize(source, tmp_path, imatrix=matrix, overrides=overrides, recorded=recorded, threads=2)
    head, original = header.read(target), header.read(source)
    for name in MODEL.shapes:
        tensor = head.tensors[name]
        rows = original.rows(name, 0, MODEL.shapes[name][0])
        expected = encode(rows, tensor.kind, matrix.get(name)).ravel()
        assert np.array_equal(np.fromfile(target, np.uint8, tensor.nbytes, offset=tensor.offset), expected), name
    kinds = {name: tensor.kind for name, tensor in head.tensors.items()}
    assert kinds["blk.0.ffn_up.weight"] == kinds["blk.0.ffn_gate.weight"] == Kind.Q8_0  # the first that matches
    assert kinds["blk.1.ffn_up.weight"] == Kind.Q5_0
    assert kinds["blk.1.ffn_gate.weight"] == Kind.Q4_K
    assert {key: head.metadata[key] for key in recorded} == recorded
    # Progress counts the bytes of what is done and ends at the end.
    total = sum(tensor.nbytes for tensor in original.tensors.values())
    assert seen == sorted(seen)
    assert [seen[0][1], seen[-1]] == [total, (total, total)]
    assert len(seen) == len(MODEL.plans)
    assert {path.name for path in tmp_path.iterdir()} == {target.name, "quantizer.json"}


def test_a_dry_run_says_the_types_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    real, _ = quantize(source, tmp_path, "Q3_K_M", overrides={"attn_k": "Q6_K"})
    expected = {name: tensor.kind for name, tensor in header.read(real).tensors.items()}
    before = {path.name for path in tmp_path.iterdir()}
    assert quantizer.dry_run(source, "Q3_K_M", tmp_path, overrides={"attn_k": "Q6_K"}) == expected
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("quant", "options", "message"),
    [
        ("IQ3_XXS", {}, "IQ3_XXS needs an importance matrix"),
        ("IQ3_XXS", {"imatrix": {"blk.0.attn_q.weight": np.ones(256, np.float32)}}, "needs an importance matrix"),
        ("Q4_K_M", {"overrides": {"attn_q": "IQ3_XXS"}}, "attn_q.weight becomes IQ3_XXS"),
        ("Q4_K_M", {"overrides": {"attn_z": "Q8_0"}}, "matches no matrix"),
        ("Q4_K_M", {"imatrix": {"blk.0.attn_q.weight": np.ones(255, np.float32)}}, "does not fit"),
        ("Q4_K_M", {"imatrix": {"blk.9.attn_q.weight": np.ones(256, np.float32)}}, "does not fit"),
        ("Q4_K_M", {"imatrix": {"blk.0.attn_q.weight": np.full(256, np.nan, np.float32)}}, "cannot be"),
        ("Q4_K_M", {"imatrix": {"blk.0.attn_q.weight": np.full(256, -1, np.float32)}}, "cannot be"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    quant: str, options: dict[str, Any], message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "run", lambda *_: pytest.fail("the child was started"))
    with pytest.raises(BadInput, match=message):
        quantize(source, tmp_path, quant, **options)
    assert not list(tmp_path.iterdir())


def test_a_text_too_long_to_record_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than 127"):
        quantize(source, tmp_path, recorded={"quantize.imatrix.dataset": "字" * 43})


def test_llama_cpps_reason_is_given(source: Path, tmp_path: Path) -> None:
    """A file that our reader accepts and llama.cpp does not."""
    data = source.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data.replace(b"qwen3.embedding_length", b"qwen3.embedding_lengtn"))
    (tmp_path / "work").mkdir()
    target = tmp_path / "out.part"
    with pytest.raises(BadInput, match="embedding_length"):
        quantizer.quantize(broken, target, "Q6_K", tmp_path / "work", lambda *_: None)
    assert not target.exists()


def test_a_full_disk_is_named_as_such(tmp_path: Path) -> None:
    """llama.cpp itself only says "iostream error"."""
    path = gguf(blueprint(vocabulary=20_000), tmp_path)
    target = tmp_path / "out.part"
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # of files that the child writes too
    try:
        with pytest.raises(BadInput, match="is full"):
            quantizer.quantize(path, target, "Q6_K", tmp_path, lambda *_: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert not target.exists()


def test_an_interrupted_run_leaves_no_file(source: Path, tmp_path: Path) -> None:
    """Ctrl-C while the child writes: it is ended and its half file removed."""
    target = tmp_path / "out.part"
    existed: list[bool] = []

    def interrupt(done: int, _total: int) -> None:
        if done:
            existed.append(target.exists())
            raise KeyboardInterrupt

    matrix = importance(MODEL)
    with pytest.raises(KeyboardInterrupt):
        quantizer.quantize(source, target, "Q6_K", tmp_path, interrupt, imatrix=matrix)
    assert existed == [True]
    assert {path.name for path in tmp_path.iterdir()} == {"quantizer.json"}


def test_contract_llama_model_quantize_params() -> None:
    """The fields that are set, their types, and the numbers of the file types."""
    fields = {name: kind for name, kind, *_ in llama_cpp.llama_model_quantize_params._fields_}
    assert fields["max_buf_size"] is ctypes.c_size_t
    assert fields["nthread"] is ctypes.c_int32
    assert fields["dry_run"] is ctypes.c_bool
    assert {"ftype", "imatrix", "kv_overrides", "tt_overrides"} <= fields.keys()
    assert [name for name, *_ in llama_cpp.llama_model_imatrix_data._fields_] == ["name", "data", "size"]
    assert [name for name, *_ in llama_cpp.llama_model_tensor_override._fields_] == ["pattern", "type"]
    assert [name for name, *_ in llama_cpp.llama_model_kv_override._fields_] == ["tag", "key", "value"]
    for quant, file_type in quantizer.FILE_TYPES.items():
        assert getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant}") == file_type
