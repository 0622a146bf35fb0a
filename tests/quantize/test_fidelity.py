"""What files are held against, within which limits, and what is kept of it."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantize import header, limits, probe, reference, strings, writer
from quantize.fidelity import KEY, RESERVED_BYTES, Expected, Fidelity, _same_answer
from quantize.hugging_face import HuggingFace
from quantize.prepare import Prepared, prepare
from quantize.source import open_source


@pytest.fixture(scope="module")
def prepared(tiny: Path) -> Prepared:
    """A Qwen3 checkpoint in float32 with a vocabulary of some hundred tokens."""
    return prepare(open_source(tiny / "3-dfpo", None, None), None)


def values(prepared: Prepared) -> dict:
    return {**prepared.hyper_parameters, **prepared.vocabulary.metadata(), KEY: " " * RESERVED_BYTES}


def write(prepared: Prepared, path: Path, quant: str) -> Path:
    weights = writer.Weights(prepared.checkpoint.tensors, None)
    writer.write(path, prepared.architecture, values(prepared), prepared.plans, weights, quant, lambda *_: None)
    return path


@pytest.fixture(scope="module")
def file(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its float32 file. Read only."""
    return write(prepared, tmp_path_factory.mktemp("file") / "x-F32.gguf", "F32")


def test_limits_follow_bits_and_size() -> None:
    order = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M", "IQ3_XXS"]
    for parameters in (10**6, 10**9, 10**10):
        klds = [limits.kld(quant, parameters) for quant in order]
        assert klds == sorted(klds)
        assert all(limits.perplexity(quant, parameters) > 1 for quant in order)
    assert limits.kld("Q4_K_M", 10**6) > limits.kld("Q4_K_M", 10**9) > limits.kld("Q4_K_M", 10**10)
    # What llama.cpp's own table shows for 8B models must pass, and four times its worst K-quant must not pass as it.
    assert 0.0313 < limits.kld("Q4_K_M", 8 * 10**9) < 0.2
    assert limits.perplexity("Q4_K_M", 8 * 10**9) > 1.029
    assert limits.kld("BF16", 10**6) == limits.kld("BF16", 10**10)
    assert limits.weight_error("F32") < limits.weight_error("Q8_0") < limits.weight_error("Q4_K")
    assert limits.weight_error("IQ4_XS") == limits.weight_error("Q4_K")


def test_held_out_texts_are_natural_and_carry_no_doses() -> None:
    dialogues = reference.held_out()
    texts = [message["content"] for dialogue in dialogues for message in dialogue.messages]
    assert len(dialogues) == 40
    assert 8_000 <= sum(map(len, texts)) <= 11_000
    assert len(set(texts)) == 80
    assert all(dialogue.messages[-1]["role"] == "assistant" for dialogue in dialogues)
    for text in texts:
        assert unicodedata.is_normalized("NFC", text)
        assert len(text) > 80
        assert not re.search(r"\d|毫克|毫升|mg|ml|每公斤", text)
    assert not set(texts) & set(strings.medical_strings())


def test_large_models_get_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_TEXT_TOKENS", (512, 8192))
    monkeypatch.setattr(reference, "_GREEDY_TOKENS", 256)
    sizes = (10**6, 6 * 10**8, 4 * 10**9, 10**11)
    assert [reference.token_budget(size, 5000) for size in sizes] == [8192, 3333, 512, 512]
    assert reference.token_budget(10**6, 151_936) == 1766
    assert [reference.answer_tokens(size, 4096) for size in sizes] == [256, 50, 32, 32]
    assert reference.answer_tokens(10**6, 100) == 50
    # Two models' logits and the blocks under way stay below a gigabyte for Qwen's vocabulary.
    assert reference.logits_bytes(151_936) < 1 << 30


def test_logits_come_in_blocks_and_leave_nothing(prepared: Prepared, file: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 600, size).tolist() for size in (150, 64, 3)]
    found: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    waiting = []

    def block(number: int, start: int, logits: np.ndarray) -> None:
        assert start == sum(map(len, found[number]))
        found[number].append(logits)
        waiting.append(len(list(tmp_path.glob("block-*.npy"))))

    answer = probe.probe(file, probe.Request(sequences=sequences), tmp_path, lambda *_: None, block)
    assert [len(blocks) for blocks in found.values()] == [3, 1, 1]
    assert max(waiting) <= 2
    assert {path.name for path in tmp_path.iterdir()} == {"probe.json"}
    assert answer.vocabulary == len(prepared.vocabulary.tokens)
    model = AutoModelForCausalLM.from_pretrained(prepared.source.checkpoint, dtype=torch.float32)
    for number, ids in enumerate(sequences):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(np.concatenate(found[number]), expected, atol=2e-5)


def test_ids_without_torch_are_those_of_transformers(prepared: Prepared, tmp_path: Path) -> None:
    live = HuggingFace(prepared.source.checkpoint)
    full = reference.collect(live, prepared.source, prepared.vocabulary, tmp_path / "hf", lambda *_: None)
    plain = reference.collect_plain(prepared.source, prepared.vocabulary, prepared.context, "file")
    assert plain.text_ids == full.text_ids
    assert [r.ids for r in plain.renderings] == [r.ids for r in full.renderings]
    assert plain.prompts == full.prompts
    assert plain.sequences == full.sequences[: full.measured]
    assert full.track is not None
    assert plain.track is plain.generated is None
    quick = reference.collect_plain(prepared.source, prepared.vocabulary, prepared.context, "quick")
    assert (quick.text_ids, quick.sequences, quick.prompts) == (full.text_ids, [], [])


def test_a_quantized_file_against_the_unquantized_without_torch(
    prepared: Prepared, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_LOGITS", 100 * len(prepared.vocabulary.tokens))  # logits of 100 positions
    truth = reference.collect_plain(prepared.source, prepared.vocabulary, prepared.context, "file")
    expected = Expected(values(prepared), prepared.architecture, prepared.plans, prepared.vocabulary)
    checks = Fidelity(truth, expected, tmp_path)
    plans = {plan.name: plan for plan in prepared.plans}
    weights = writer.Weights(prepared.checkpoint.tensors, None)
    gates = checks.check(file, "F32", lambda n, a, b: weights.rows(plans[n], a, b), lambda *_: None)
    assert all(gate.passed for gate in gates)
    assert not any(gate.name.startswith("kld") for gate in gates)  # there is nothing to compare the base with
    small = write(prepared, tmp_path / "x-Q8_0.gguf", "Q8_0")
    gates = checks.check(small, "Q8_0", header.read(file).rows, lambda *_: None)
    assert all(gate.passed for gate in gates)
    found = {gate.name: gate for gate in gates}
    assert found["top1_vs_f32"].detail.startswith("100 positions")
    assert 0 < float(found["kld_vs_f32"].value or 0) <= float(found["kld99_vs_f32"].value or 0)
    # Perplexity is over all tokens, also those whose logits were not kept.
    assert float(found["perplexity_vs_f32"].value or 0) == pytest.approx(1, abs=0.01)
    assert sum(len(ids) for ids in truth.sequences) > 200
    assert [answer["file"] for answer in checks.answers] == ["F32"] * 4 + ["Q8_0"] * 4
    assert checks.answers[4]["its_answer"] == checks.answers[0]["answer"]
    summary = checks.summary("Q8_0")
    header.patch(small, KEY, summary)
    told = json.loads(header.read(small).metadata[KEY])
    assert told["against"] == "f32"
    assert told["kld"] == pytest.approx(found["kld_vs_f32"].value, rel=1e-3)
    assert len(summary.encode()) <= RESERVED_BYTES


def test_a_finer_file_against_a_base_of_16_bits(prepared: Prepared, file: Path, tmp_path: Path) -> None:
    """The base's own rounding must not count against the file that has less of it."""
    truth = reference.collect_plain(prepared.source, prepared.vocabulary, prepared.context, "file")
    expected = Expected(values(prepared), prepared.architecture, prepared.plans, prepared.vocabulary)
    checks = Fidelity(truth, expected, tmp_path, base="BF16")
    coarse = write(prepared, tmp_path / "x-BF16.gguf", "BF16")
    assert all(gate.passed for gate in checks.check(coarse, "BF16", None, lambda *_: None))
    found = {gate.name: gate for gate in checks.check(file, "F32", None, lambda *_: None)}
    assert found["kld_vs_bf16"].passed
    assert float(found["kld_vs_bf16"].value or 0) > limits.kld("F32", 0)


def test_a_changed_file_fails_against_the_unquantized(prepared: Prepared, file: Path, tmp_path: Path) -> None:
    """Another model in the place of the quantized one."""
    truth = reference.collect_plain(prepared.source, prepared.vocabulary, prepared.context, "file")
    expected = Expected(values(prepared), prepared.architecture, prepared.plans, prepared.vocabulary)
    checks = Fidelity(truth, expected, tmp_path)
    checks.check(file, "F32", None, lambda *_: None)
    small = write(prepared, tmp_path / "x-Q8_0.gguf", "Q8_0")
    place = header.read(small).tensors["blk.0.ffn_down.weight"]
    with small.open("r+b") as opened:
        opened.seek(place.offset)
        data = np.frombuffer(opened.read(place.nbytes), np.uint8).reshape(-1, 34)[::-1]  # blocks in reverse order
        opened.seek(place.offset)
        opened.write(data.tobytes())
    gates = checks.check(small, "Q8_0", header.read(file).rows, lambda *_: None)
    assert {"kld_vs_f32", "weights"} <= {gate.name for gate in gates if not gate.passed}


@pytest.mark.parametrize(
    ("found", "ended", "same"),
    [
        ([1, 2, 3], False, True),
        ([1, 9, 3], False, True),  # parted where the reference had a tie
        ([1, 2, 9], False, False),
        ([1, 2], True, True),  # llama.cpp knows more ends than Hugging Face was told
        ([1, 2], False, False),
        ([1, 2, 3, 4], False, False),
    ],
)
def test_same_answer(found: list[int], ended: bool, same: bool) -> None:
    assert _same_answer([1, 2, 3], found, [1.0, 0.01, 1.0], 0.05, ended) is same
