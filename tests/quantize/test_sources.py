"""Every kind of source: a bare checkpoint, one with a MUE or LoRA adapter, and the paper's released layout."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import piece_vocabulary
import pytest
import torch
from llama_vocabulary import llama_source
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import baichuan_logits, make_baichuan
from transformers import AutoModelForCausalLM

from quantize import cli, header
from quantize.merging.lora import LoraMerge
from quantize.probe import Request, probe
from quantize.run_folder import read_dialogues
from trainer.prompts import baichuan_template

EXPERTS, R, ALPHA = 4, 2, 6


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.reference._GREEDY_TOKENS", 8)


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Runs the command, which must succeed; returns its report."""
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logits(file: Path, ids: list[int], work: Path) -> np.ndarray:
    """Logits [tokens, vocabulary] of a GGUF through llama.cpp."""
    blocks: list[np.ndarray] = []
    work.mkdir()
    probe(file, Request(sequences=[ids]), work, lambda *_: None, lambda _number, _start, found: blocks.append(found))
    return np.concatenate(blocks)


def test_a_bare_checkpoint(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = exported(capsys, str(tiny / "3-dfpo"), "--name", "bare", "--output", str(tmp_path / "dist"))
    assert report["merge"] is None
    metadata = header.read(tmp_path / "dist/bare-Q8_0.gguf").metadata
    # The app takes its built-in prompts for a model that is not ours.
    assert not [key for key in metadata if key.startswith("pediatricsgpt.") and "prompt" in key]
    assert metadata["general.license"] == "unknown"
    assert json.loads(metadata["pediatricsgpt.fidelity"])["kld"] < 0.03


def test_quick_and_file_checks_do_without_torch(tiny: Path, tmp_path: Path) -> None:
    for level in ("quick", "file"):
        code = (
            "import sys; from quantize import cli\n"
            f"code = cli.main({[str(tiny / '3-dfpo'), '--output', str(tmp_path / level), '--check', level]!r})\n"
            "sys.exit(f'imported: {found}' if (found := {'torch', 'transformers'} & set(sys.modules)) else code)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    names = {gate["name"] for gate in json.loads((tmp_path / "quick/fidelity.json").read_text())["gates"]}
    assert "token_ids" in names
    assert not names & {"weights", "kld_vs_f32"}


def test_a_lora_is_folded_in_exactly(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny / "3-dfpo", dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 3},
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model: Any = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(tmp_path / "lora"))
    ids = list(range(40, 72))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    arguments = ("--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "dist"), "--name", "l")
    exported(capsys, str(tiny / "3-dfpo"), *arguments, "--quant", "F32")
    found = logits(tmp_path / "dist/l-F32.gguf", ids, tmp_path / "work")
    np.testing.assert_allclose(found, expected, atol=2e-4)
    delta = LoraMerge(tmp_path / "lora").delta_rows("model.layers.1.mlp.down_proj", slice(None))
    file = tmp_path / "lora/adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    older = LoraMerge(tmp_path / "lora").delta_rows("model.layers.1.mlp.down_proj", slice(None))
    np.testing.assert_array_equal(older, delta)


def test_a_lora_for_another_base_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny / "3-dfpo", dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "lora"))
    file = tmp_path / "lora/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: torch.cat([t, t]) if "lora_B" in k else t for k, t in tensors.items()}, file)
    arguments = [str(tiny / "3-dfpo"), "--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "dist")]
    assert cli.main(arguments) == 2
    assert "trained on another base" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("setting", [{"init_lora_weights": "pissa_niter_4"}, {"alora_invocation_tokens": [5, 6]}])
def test_a_lora_that_is_more_than_added_matrices_is_refused(
    setting: dict[str, Any], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PiSSA takes its start out of the base: folded into the whole base, every weight would be silently wrong."""
    base = AutoModelForCausalLM.from_pretrained(tiny / "3-dfpo", dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path / "lora"))
    file = tmp_path / "lora/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    arguments = [str(tiny / "3-dfpo"), "--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "dist")]
    assert cli.main(arguments) == 2
    assert next(iter(setting)) in capsys.readouterr().err


def test_a_template_that_marks_no_answers_can_be_merged_on(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published templates ask for the next answer (add_generation_prompt), and have no generation tag."""
    (damaged / "3-dfpo/chat_template.jinja").write_text(llama_source.CHATML)
    report = exported(capsys, str(damaged), "--output", str(tmp_path / "dist"))
    assert report["merge"]["tokens"] > 0


def test_line_separators_inside_a_dialogue_end_no_line(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "发热\u2028咳嗽\x85"}, {"role": "assistant", "content": "多喝水。"}]
    file = tmp_path / "calibration.jsonl"
    line = json.dumps({"task": "t", "messages": messages}, ensure_ascii=False)
    file.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    assert [dialogue.messages for dialogue in read_dialogues(file)] == [messages, messages]


def test_a_checkpoint_with_a_mue_adapter(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without dialogues the gates are uniform; with them it is the run folder's own export."""
    source, adapter = str(tiny / "3-dfpo"), str(tiny / "4-mue")
    exported(capsys, source, "--adapter", adapter, "--output", str(tmp_path / "plain"), "--name", "m")
    metadata = header.read(tmp_path / "plain/m-Q8_0.gguf").metadata
    assert metadata["pediatricsgpt.merge_method"] == "uniform"
    dialogues = ("--calibration", str(tiny / "calibration.jsonl"))
    report = exported(capsys, source, "--adapter", adapter, *dialogues, "--output", str(tmp_path / "fit"))
    assert report["merge"]["method"] == "least-squares"
    assert cli.main([source, "--adapter", adapter, "--merge", "usage", "--output", str(tmp_path / "no")]) == 2
    assert "--calibration" in capsys.readouterr().err


def released_13b(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A 40-layer Baichuan2 in miniature with an adapter of the released code; returns the merged tensors."""
    tensors = make_baichuan(folder / "base", layers=40, vocabulary=125_696, heads=6)
    (folder / "base/tokenizer.model").write_bytes(piece_vocabulary.train(125_696))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": baichuan_template()}
    (folder / "base/tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(2)
    adapter, targets = {}, ["gate_proj", "up_proj", "down_proj"]
    for layer in range(40):
        for name in targets:
            weight = tensors[f"model.layers.{layer}.mlp.{name}.weight"]
            outputs, inputs = weight.shape
            a, b = torch.randn(EXPERTS, inputs, R) * 0.1, torch.randn(EXPERTS, R, outputs) * 0.1
            module = f"base_model.model.model.layers.{layer}.mlp.{name}"
            adapter |= {f"{module}.lora_moe_A": a, f"{module}.lora_moe_B": b}
            adapter |= {f"{module}.lora_route.weight": torch.randn(EXPERTS - 1, inputs)}
            adapter |= {f"{module}.w_noise": torch.randn(inputs, EXPERTS - 1)}
            gates = [1.0] + [1 / (EXPERTS - 1)] * (EXPERTS - 1)
            for gate, down, up in zip(gates, a, b, strict=True):
                weight += (ALPHA / R * gate * (down @ up)).T
    (folder / "moe").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "moe/adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "lora_nums": EXPERTS, "bias": "none",
                "target_modules": targets}  # fmt: skip
    (folder / "moe/adapter_config.json").write_text(json.dumps(settings))
    return tensors, targets


def test_the_papers_released_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Baichuan2-13B with its MoE adapter: ALiBi, W_pack, NormHead, uniform gates, role tokens as control tokens."""
    merged, _ = released_13b(tmp_path)
    arguments = ("--adapter", str(tmp_path / "moe"), "--output", str(tmp_path / "dist"), "--name", "b")
    report = exported(capsys, str(tmp_path / "base"), *arguments, "--quant", "F32", "--quant", "Q8_0")
    assert report["check"] == "file"
    ids = list(range(300, 340))
    found = logits(tmp_path / "dist/b-F32.gguf", ids, tmp_path / "work")
    expected = baichuan_logits(merged, ids, heads=6, alibi=True, norm_head=True)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    metadata = header.read(tmp_path / "dist/b-Q8_0.gguf").metadata
    assert metadata["pediatricsgpt.merge_method"] == "uniform"
    shutil.rmtree(tmp_path / "dist")


def test_a_released_adapter_without_routers_needs_uniform_gates_by_name(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moe"
    folder.mkdir()
    shapes = {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}
    tensors = {
        f"base_model.model.model.layers.{layer}.mlp.{name}.lora_moe_{part}": torch.randn(EXPERTS, *shape) * 0.05
        for layer in range(2)
        for name, (inputs, outputs) in shapes.items()
        for part, shape in (("A", (inputs, R)), ("B", (R, outputs)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "lora_nums": EXPERTS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    arguments = [str(tiny / "3-dfpo"), "--adapter", str(folder), "--output", str(tmp_path / "dist"), "--name", "m"]
    dialogues = ["--calibration", str(tiny / "calibration.jsonl")]
    assert cli.main([*arguments, *dialogues]) == 2
    assert "--merge uniform" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*arguments, "--merge", "uniform"]) == 0
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    assert cli.main([*arguments, *dialogues, "--force"]) == 2
    assert "uniform" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tiny}", "--adapter", "{tiny}/4-mue"], "has its own adapter"),
        (["{tiny}/3-dfpo", "--adapter", "nowhere"], "no adapter folder"),
        (["{tiny}/3-dfpo", "--merge", "usage"], "this source has none"),
        (["{tiny}/3-dfpo", "--task-adapters"], "least squares"),
        (["{tiny}", "--merge", "usage", "--task-adapters"], "least squares"),
        (["{tiny}", "--tensor-type", "ffn=Q6_K"], "K- and IQ-types"),
        (["{tiny}", "--quant", "Q4_K_M", "--tensor-type", "nothing_like_it=Q6_K"], "matches no"),
        (["{tiny}", "--calibration", "nowhere.jsonl"], "does not exist"),
        (["{tiny}", "--calibration", "{tmp}"], "cannot be read"),
        (["{tiny}/3-dfpo", "--adapter", "{tiny}/4-mue", "--merge", "usage"], "needs dialogues"),
        (["{tmp}"], "neither run.json nor config.json"),
    ],
)
def test_refuses(
    arguments: list[str], words: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format(tiny=tiny, tmp=tmp_path) for argument in arguments]
    assert cli.main([*arguments, "--output", str(tmp_path / "dist")]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "dist").exists()
    assert cli.main([*arguments, "--dry-run"]) == 2


def test_a_task_that_is_a_path_makes_no_adapter(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = damaged / "calibration.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"diagnosis"', '"../../up"'), encoding="utf-8")
    assert cli.main([str(damaged), "--task-adapters", "--output", str(tmp_path / "dist")]) == 2
    assert "../../up" in capsys.readouterr().err


def test_a_file_names_its_source_and_what_was_measured(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(capsys, str(tiny), "--output", str(tmp_path / "dist"))
    inputs = json.loads((tmp_path / "dist/manifest.json").read_text())["inputs"]
    compact = json.dumps(inputs, ensure_ascii=False, sort_keys=True)
    metadata = header.read(tmp_path / "dist/tiny-Q8_0.gguf").metadata
    assert metadata["pediatricsgpt.source_sha256"] == hashlib.sha256(compact.encode()).hexdigest()
    measured = json.loads(metadata["pediatricsgpt.fidelity"])
    assert measured["level"] == "full"
    assert measured["tokens"] > 0
