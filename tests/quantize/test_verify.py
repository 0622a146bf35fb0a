"""`pediatricsgpt verify`: a good file passes at every level, and each fault is caught by the check made for it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_random
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from quantize import header, writer
from quantize.commands import verify
from quantize.fidelity import KEY
from quantize.prepare import Prepared, prepare
from quantize.source import open_source

Values = dict[str, Any]


def written(folder: Path, source: Path, quant: str, change: Callable[[Prepared, Values], object] | None = None) -> Path:
    """The GGUF of a checkpoint; `change` may spoil its metadata or its list of tensors first."""
    prepared = prepare(open_source(source, None, None), None)
    values: Values = {**prepared.hyper_parameters, **prepared.vocabulary.metadata(), KEY: '{"level":"full"}'}
    if change is not None:
        change(prepared, values)
    path = folder / f"model-{quant}.gguf"
    weights = writer.Weights(prepared.checkpoint.tensors, None)
    writer.write(path, prepared.architecture, values, prepared.plans, weights, quant, lambda *_: None)
    return path


@pytest.fixture(scope="module")
def source(tiny: Path) -> Path:
    """A Qwen3 checkpoint in float32."""
    return tiny / "3-dfpo"


@pytest.fixture(scope="module")
def half(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "half"
    shutil.copytree(source, folder)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def biased(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint, whose queries, keys and values have biases."""
    folder = tmp_path_factory.mktemp("biased") / "biased"
    shutil.copytree(source, folder)
    size = json.loads((source / "config.json").read_text())["vocab_size"]
    config = Qwen2Config(
        vocab_size=size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return save_random(Qwen2ForCausalLM(config), folder)


@pytest.fixture(scope="module")
def file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 file of the checkpoint. Read only."""
    return written(tmp_path_factory.mktemp("file"), source, "F32")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the command with --json: exit code and report (or {"error": …})."""

    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        code = verify.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, json.loads(out) if out else {"error": " ".join(err.split())}

    return call


def gates(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {gate["name"]: gate for gate in report["gates"]}


Run = Callable[..., tuple[int, dict[str, Any]]]


def test_a_file_by_itself(file: Path, run: Run) -> None:
    code, report = run(file)
    assert (code, report["level"], report["failed"]) == (0, "file", [])
    found = gates(report)
    assert found["text_restored"]["value"] == found["append_only"]["value"] == 0
    assert found["finite_weights"]["passed"]
    assert found["checksum"]["value"] == "none"
    assert report["claims"] == {"level": "full"}
    assert report["architecture"] == "qwen3"
    assert len(report["answers"]) == 4
    assert all(answer["stop"] in ("end", "limit") for answer in report["answers"])


def test_quick_loads_no_weights(file: Path, run: Run, tmp_path: Path) -> None:
    """The weights are not even there."""
    head = header.read(file)
    cut = tmp_path / "empty.gguf"
    data = bytearray(file.read_bytes())
    start = min(tensor.offset for tensor in head.tensors.values())
    data[start:] = b"\xff" * (len(data) - start)  # not a number, everywhere
    cut.write_bytes(data)
    code, report = run(cut, "--level", "quick")
    assert (code, report["failed"], report["answers"]) == (0, [], [])
    code, report = run(cut, "--level", "file")
    assert code == 1
    assert any("finite_weights" in name for name in report["failed"])


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_against_its_source(quant: str, source: Path, tmp_path: Path, run: Run) -> None:
    code, report = run(written(tmp_path, source, quant), "--against", source, "--output", tmp_path / "report.json")
    assert (code, report["level"], report["failed"]) == (0, "full", [])
    found = gates(report)
    assert found["token_ids"]["detail"].split()[0] >= "500"
    assert found["kld_vs_hf"]["value"] < (1e-9 if quant == "F32" else 0.01)
    assert (found["kld_vs_hf"]["value"] > 1e-6) == (quant == "Q8_0")
    assert found["perplexity_vs_hf"]["value"] == pytest.approx(1, abs=0.05)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    if quant == "F32":
        assert all(answer["common_tokens"] == answer["tokens"] for answer in report["answers"])
        assert all(answer["answer"] == answer["its_answer"] for answer in report["answers"])


def test_bfloat16_against_its_source(half: Path, tmp_path: Path, run: Run) -> None:
    """llama.cpp rounds more than the file does; the limits know it, and the weights are still exact."""
    code, report = run(written(tmp_path, half, "BF16"), "--against", half)
    assert (code, report["failed"]) == (0, [])
    found = gates(report)
    assert 1e-7 < found["kld_vs_hf"]["value"] < found["kld_vs_hf"]["limit"]
    assert found["weight_bits"]["value"] == 0


def test_against_the_unquantized_file(file: Path, source: Path, tmp_path: Path, run: Run) -> None:
    code, report = run(written(tmp_path, source, "Q8_0"), "--reference", file)
    assert (code, report["failed"]) == (0, [])
    assert 1e-6 < gates(report)[f"kld_vs_{file.name}"]["value"] < 0.01
    assert report["answers"][0]["against"] == file.name


def flip(path: Path, tensor: str, byte: int, bit: int) -> None:
    place = header.read(path).tensors[tensor]
    with path.open("r+b") as opened:
        opened.seek(place.offset + byte)
        old = opened.read(1)[0]
        opened.seek(place.offset + byte)
        opened.write(bytes([old ^ 1 << bit]))


@pytest.mark.parametrize(("quant", "byte"), [("F32", 400), ("BF16", 402)])
def test_the_lowest_bit_of_one_weight(
    quant: str, byte: int, source: Path, half: Path, tmp_path: Path, run: Run
) -> None:
    """No logit shows it; the comparison of the weights does."""
    origin = source if quant == "F32" else half
    path = written(tmp_path, origin, quant)
    flip(path, "blk.1.ffn_down.weight", byte, 0)
    code, report = run(path, "--against", origin, "--level", "file")
    assert (code, report["failed"]) == (1, [f"weight_bits ({quant})"])
    assert "blk.1.ffn_down.weight" in gates(report)["weight_bits"]["detail"]


def test_a_wrong_weight_shows_in_the_logits_too(source: Path, tmp_path: Path, run: Run) -> None:
    path = written(tmp_path, source, "F32")
    flip(path, "output_norm.weight", 7, 6)  # the second weight becomes a huge or tiny number
    code, report = run(path, "--against", source)
    assert code == 1
    assert {"weights (F32)", "weight_bits (F32)", "kld_vs_hf (F32)"} <= set(report["failed"])


def another_template(_: Prepared, values: Values) -> None:
    values["tokenizer.chat_template"] = values["tokenizer.chat_template"].replace("<|im_end|>", "<|im_end|> ")


def swapped_tokens(_: Prepared, values: Values) -> None:
    tokens = list(values["tokenizer.ggml.tokens"])
    tokens[400], tokens[401] = tokens[401], tokens[400]
    values["tokenizer.ggml.tokens"] = tokens


FAULTS: dict[str, tuple[Callable[[Prepared, Values], object], set[str]]] = {
    "wrong eos": (lambda _, v: v.update({"tokenizer.ggml.eos_token_id": 70}), {"header", "eos"}),
    "another template": (another_template, {"header", "chat_template"}),
    "swapped tokens": (swapped_tokens, {"header", "token_ids"}),
    "another splitter": (lambda _, v: v.update({"tokenizer.ggml.pre": "gpt-2"}), {"header", "token_ids"}),
    "another base of the rotation": (lambda _, v: v.update({"qwen3.rope.freq_base": 10000.0}), {"header"}),
    "control token of ordinary type": (
        lambda _, v: v.update({"tokenizer.ggml.token_type": [1, *v["tokenizer.ggml.token_type"][1:]]}),
        {"header"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_metadata(fault: str, source: Path, tmp_path: Path, run: Run) -> None:
    change, expected = FAULTS[fault]
    code, report = run(written(tmp_path, source, "F32", change), "--against", source, "--level", "quick")
    assert code == 1
    assert expected <= {name.split()[0] for name in report["failed"]}


def test_a_rotation_of_another_base_shows_in_the_logits(source: Path, tmp_path: Path, run: Run) -> None:
    change = FAULTS["another base of the rotation"][0]
    code, report = run(written(tmp_path, source, "F32", change), "--against", source)
    assert code == 1
    assert "kld_vs_hf (F32)" in report["failed"]


def test_a_wrong_eos_is_seen_without_the_source(source: Path, tmp_path: Path, run: Run) -> None:
    code, report = run(written(tmp_path, source, "F32", FAULTS["wrong eos"][0]), "--level", "quick")
    assert (code, report["failed"]) == (1, ["eos (F32)"])


@pytest.mark.parametrize("ours", [True, False])
def test_a_template_that_rewrites_the_past(ours: bool, source: Path, tmp_path: Path, run: Run) -> None:
    """A fault in a model of ours; of a foreign one it is only told."""

    def change(_: Prepared, values: Values) -> None:
        values["tokenizer.chat_template"] = values["tokenizer.chat_template"].rstrip() + "{{ messages|length }}"
        if ours:
            values["pediatricsgpt.contract"] = 1

    code, report = run(written(tmp_path, source, "F32", change), "--level", "quick")
    assert (code, report["failed"]) == ((1, ["append_only (F32)"]) if ours else (0, []))
    assert next(gate["value"] for gate in report["gates"] if gate["name"] == "append_only") > 0


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages[0].content }}", "{{ 1 / 0 }}", "{{ range(10**9) }}"])
def test_a_template_that_cannot_be_used(template: str, source: Path, tmp_path: Path, run: Run) -> None:
    change = {"tokenizer.chat_template": template}
    code, report = run(written(tmp_path, source, "F32", lambda _, v: v.update(change)), "--level", "quick")
    assert (code, report["failed"]) == (1, ["chat_template (F32)"])


def test_dropped_and_wrong_biases(biased: Path, tmp_path: Path, run: Run) -> None:
    """llama.cpp loads a Qwen2 without its biases; we do not."""

    def drop(prepared: Prepared, _: Values) -> None:
        prepared.plans.remove(next(plan for plan in prepared.plans if plan.name == "blk.1.attn_k.bias"))

    code, report = run(written(tmp_path, biased, "F32"), "--against", biased)
    assert (code, report["failed"]) == (0, [])
    code, report = run(written(tmp_path, biased, "F32", drop))
    assert code == 2
    assert "blk.1.attn_k.bias is missing" in report["error"]
    path = written(tmp_path, biased, "F32")
    place = header.read(path).tensors["blk.1.attn_q.bias"]
    with path.open("r+b") as opened:
        opened.seek(place.offset)
        opened.write(bytes(place.nbytes))
    code, report = run(path, "--against", biased)
    assert code == 1
    assert {"weights (F32)", "kld_vs_hf (F32)"} <= set(report["failed"])


def test_checksums_beside_the_file(file: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / file.name
    shutil.copy(file, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    sums, manifest = tmp_path / "SHA256SUMS", tmp_path / "manifest.json"
    sums.write_text(f"{digest}  {file.name}\n")
    manifest.write_text(json.dumps({"outputs": {file.name: {"sha256": digest}}}))
    assert gates(run(path, "--level", "quick")[1])["checksum"]["passed"]
    sums.write_text(f"{'0' * 64}  {file.name}\n")
    assert run(path, "--level", "quick")[1]["failed"] == ["checksum (F32)"]
    sums.unlink()
    flip(path, "blk.1.ffn_down.weight", 400, 0)
    code, report = run(path, "--level", "quick")
    assert (code, report["failed"]) == (1, ["checksum (F32)"])


def test_without_a_model_in_transformers_the_level_falls_and_says_so(
    file: Path, source: Path, tmp_path: Path, run: Run
) -> None:
    folder = shutil.copytree(source, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**json.loads((folder / "tokenizer_config.json").read_text()), "tokenizer_class": None})
    )
    code, report = run(file, "--against", folder)
    assert (code, report["level"], report["failed"]) == (0, "file", [])
    assert "not against Hugging Face" in gates(report)["level"]["detail"]
    code, report = run(file, "--against", folder, "--level", "full")
    assert code == 2


def damaged(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_unusable_files_and_wrong_use(file: Path, source: Path, tiny: Path, tmp_path: Path, run: Run) -> None:
    data = file.read_bytes()
    for name, content, words in (
        ("cut.gguf", data[:-100], "cut.gguf: the data of"),
        ("text.gguf", b"hello" * 10, "text.gguf: it is not a GGUF file"),
        ("empty.gguf", b"", "empty.gguf: it is too short"),
    ):
        code, report = run(damaged(tmp_path / name, content))
        assert (code, words in report["error"]) == (2, True)
    for arguments, words in (
        ((tmp_path / "none.gguf",), "There is no file"),
        ((file, "--level", "full"), "--against"),
        ((file, "--against", tiny), "is a run folder"),
        ((file, "--against", tmp_path / "nowhere"), "nowhere"),
        ((file, "--reference", tmp_path / "none.gguf"), "There is no file"),
    ):
        code, report = run(*arguments)
        assert (code, words in report["error"]) == (2, True), report


@pytest.mark.parametrize("claims", ["[" * 100_000, '{"kld": NaN}', r'{"a": "\ud800"}'])
def test_claims_that_no_report_can_hold_are_left_out(claims: str, source: Path, tmp_path: Path, run: Run) -> None:
    code, report = run(written(tmp_path, source, "F32", lambda _, v: v.update({KEY: claims})), "--level", "quick")
    assert (code, report["claims"]) == (0, None)


@pytest.mark.parametrize("quant", ["F32", "BF16"])
def test_a_checkpoint_of_another_size(
    quant: str, source: Path, make: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    other = make(tmp_path / "wider", hidden=96) / "3-dfpo"
    code, report = run(written(tmp_path, source, quant), "--against", other, "--level", "file")
    assert code == 1
    assert {f"header ({quant})", f"weights ({quant})"} <= set(report["failed"])


def test_another_models_file_is_no_reference(file: Path, source: Path, tmp_path: Path, run: Run) -> None:
    other = written(tmp_path, source, "F32", swapped_tokens)
    code, report = run(file, "--reference", other)
    assert code == 2
    assert "another vocabulary" in report["error"]


def test_the_table_for_people(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert verify.main([str(file)]) == 0
    out = capsys.readouterr().out
    for words in ("typed text read as control", "greedy answers", "Every check held.", '{"level": "full"}'):
        assert words in out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "pediatricsgpt verify model-Q4_K_M.gguf --against Qwen3-1.7B" in out
    assert "exit codes" in out
