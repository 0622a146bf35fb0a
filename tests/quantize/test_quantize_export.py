"""The corridor from a run folder to a distribution folder, on real files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from quantize import cli, header


@pytest.fixture(scope="module")
def distribution(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the wide run in three types."""
    output = tmp_path_factory.mktemp("dist") / "wide"
    arguments = [str(wide), "--output", str(output), "--quant", "Q4_K_M", "--quant", "F32", "--quant", "Q8_0"]
    assert cli.main(arguments) == 0
    return output


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.reference._GREEDY_TOKENS", 16)


def test_leaves_exactly_the_distribution(distribution: Path) -> None:
    names = {path.name for path in distribution.iterdir()}
    models = {"tiny-Q4_K_M.gguf", "tiny-F32.gguf", "tiny-Q8_0.gguf"}
    assert names == models | {"manifest.json", "SHA256SUMS", "fidelity.json", "README.md", "Modelfile"}


def test_checksums_cover_every_file(distribution: Path) -> None:
    lines = [line.split("  ") for line in (distribution / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == {p.name for p in distribution.iterdir()} - {"SHA256SUMS"}
    for digest, name in lines:
        assert hashlib.sha256((distribution / name).read_bytes()).hexdigest() == digest


def test_manifest_names_inputs_and_outputs_by_sha256(distribution: Path, wide: Path) -> None:
    manifest = json.loads((distribution / "manifest.json").read_text())
    for name in ("run.json", "prompts.json", "3-dfpo/model.safetensors", "4-mue/adapter_model.safetensors"):
        assert manifest["inputs"][name] == hashlib.sha256((wide / name).read_bytes()).hexdigest()
    size = (distribution / "tiny-Q8_0.gguf").stat().st_size
    assert manifest["outputs"]["tiny-Q8_0.gguf"]["bytes"] == size
    assert manifest["corpus_sha256"] == "c" * 64
    assert manifest["versions"]["gguf"]


def test_fidelity_is_measured(distribution: Path) -> None:
    report = json.loads((distribution / "fidelity.json").read_text())
    gates = {(gate["name"], gate["file"]): gate for gate in report["gates"]}
    assert report["passed"]
    assert report["failed"] == []
    assert gates["top1_vs_hf", "F32"]["value"] == 1.0
    assert gates["kld_vs_hf", "F32"]["value"] < 1e-6
    assert gates["token_ids", "F32"]["detail"].startswith("573 strings")
    # Coarser types are farther away, and none is free.
    distances = [gates["kld_vs_f32", quant]["value"] for quant in ("Q8_0", "Q4_K_M")]
    assert 0 < distances[0] < distances[1]
    assert set(report["bytes"]) == {"tiny-Q4_K_M.gguf", "tiny-F32.gguf", "tiny-Q8_0.gguf"}


def test_types_are_what_the_name_says(distribution: Path) -> None:
    quantized = header.read(distribution / "tiny-Q4_K_M.gguf").types()
    # attn_output has 4 heads of 80 = 320 columns: no 256-block fits, llama.cpp falls back, the report says so.
    assert quantized["Q4_K"] == 11
    assert quantized["Q5_0"] == 2
    gates = json.loads((distribution / "fidelity.json").read_text())["gates"]
    detail = next(g["detail"] for g in gates if g["name"] == "types" and g["file"] == "Q4_K_M")
    assert "2 matrices fell back" in detail
    assert header.read(distribution / "tiny-Q8_0.gguf").types() == {"Q8_0": 16, "F32": 9}


def test_metadata_carries_the_contract(distribution: Path, wide: Path) -> None:
    prompts = json.loads((wide / "prompts.json").read_text(encoding="utf-8"))
    for name in ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"):
        metadata = header.read(distribution / name).metadata
        assert metadata["general.architecture"] == "qwen3"
        assert metadata["qwen3.attention.key_length"] == 80
        assert metadata["qwen3.rope.freq_base"] == 1e6
        assert metadata["tokenizer.ggml.pre"] == "qwen2"
        assert metadata["tokenizer.ggml.eos_token_id"] == 2
        assert metadata["pediatricsgpt.contract"] == 1
        assert metadata["pediatricsgpt.demonstration"] is True
        assert metadata["pediatricsgpt.system_prompt"] == prompts["system_prompt"]
        assert metadata["pediatricsgpt.passage_template"] == prompts["passage_template"]
        assert json.loads(metadata["pediatricsgpt.phrases"]) == prompts["phrases"]
        assert json.loads(metadata["pediatricsgpt.task_prompts"]) == prompts["task_prompts"]
        assert json.loads(metadata["pediatricsgpt.merge_fidelity"])["nll_base"] > 0
        assert metadata["pediatricsgpt.merge_method"] == "least-squares"
        assert "generation %}" not in metadata["tokenizer.chat_template"]


def test_documents_state_what_was_measured(distribution: Path) -> None:
    card = (distribution / "README.md").read_text(encoding="utf-8")
    report = json.loads((distribution / "fidelity.json").read_text())
    assert "not for clinical use" in card
    assert "apache-2.0" in card
    assert f"{report['merge']['nll_merged']:.4f}" in card
    modelfile = (distribution / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith("FROM ./tiny-Q4_K_M.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in modelfile


def test_refuses_then_replaces_an_existing_export(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dist"
    first = [str(tiny), "--output", str(output), "--name", "model", "--quant", "F16"]
    assert cli.main(first) == 0
    before = (output / "model-F16.gguf").read_bytes()
    capsys.readouterr()
    assert cli.main(first) == 2
    assert "--force" in capsys.readouterr().err
    again = [str(tiny), "--output", str(output), "--name", "model", "--quant", "Q8_0", "--force", "--json"]
    assert cli.main([*again, "--merge", "universal"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["merge"]["method"] == "universal"
    # The first file would no longer be covered by the checksums.
    assert not (output / "model-F16.gguf").exists()
    assert (output / "model-Q8_0.gguf").stat().st_size < len(before)


def test_generation_ends_where_the_source_ends(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quantize.reference._GREEDY_TOKENS", 48)
    run = make(tmp_path / "run", tied=False, seed=3)
    file = run / "3-dfpo/model.safetensors"
    tensors = load_file(file)
    # A row long enough to win as soon as its sign is right: every answer ends after a few tokens.
    tensors["lm_head.weight"][2] *= 4
    save_file(tensors, file)
    assert cli.main([str(run), "--output", str(tmp_path / "dist"), "--json"]) == 0
    gates = {(g["name"], g["file"]): g for g in json.loads(capsys.readouterr().out)["gates"]}
    detail = "4 of 4 greedy answers end by themselves, Hugging Face 4; 0 answers differ"
    assert gates["generation_ends", "F32"]["detail"] == detail
    assert gates["generation_ends", "Q8_0"]["value"] > 0
    assert gates["eos_after_answer", "F32"]["passed"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "pediatricsgpt quantize Qwen3-1.7B --quant Q4_K_M" in out
    assert "exit codes" in out
