"""Everything that must be refused: one sentence, exit code 2, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantize import cli

Damage = Callable[[Path], object]


def edit_json(name: str, change: Callable[[Any], object]) -> Damage:
    def damage(run: Path) -> None:
        value = json.loads((run / name).read_text(encoding="utf-8"))
        change(value)
        (run / name).write_text(json.dumps(value), encoding="utf-8")

    return damage


def edit_tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(run: Path) -> None:
        tensors = load_file(run / name)
        change(tensors)
        save_file(tensors, run / name)

    return damage


def cut(name: str, size: int) -> Damage:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:size])


MODEL, ADAPTER = "3-dfpo/model.safetensors", "4-mue/adapter_model.safetensors"
UP = "base_model.model.model.layers.0.mlp.up_proj.mue_"
ROWS = {"A": 8, "route": 3, "noise": 3}
TOKENIZER, CONFIG = "3-dfpo/tokenizer.json", "3-dfpo/config.json"
CASES: dict[str, tuple[Damage, str]] = {
    "missing tensor": (edit_tensors(MODEL, lambda t: t.pop("model.layers.0.mlp.up_proj.weight")), "is missing"),
    "extra tensor": (edit_tensors(MODEL, lambda t: t.update({"model.x": np.zeros((2, 2))})), "F64"),
    "unknown tensor": (edit_tensors(MODEL, lambda t: t.update({"q.bias": np.zeros(2, np.float32)})), "is not known"),
    "wrong shape": (
        edit_tensors(MODEL, lambda t: t.update({"model.norm.weight": np.ones(8, np.float32)})),
        "has shape (8,)",
    ),
    "cut-off weights": (cut(MODEL, 5000), "cut off or damaged"),
    "not safetensors": (lambda run: (run / MODEL).write_bytes(b"\x08" + bytes(7) + b"not json"), "not a readable"),
    "empty weights": (cut(MODEL, 0), "not a readable"),
    "no adapter": (lambda run: (run / ADAPTER).unlink(), "stage mue"),
    "another adapter type": (edit_json("4-mue/adapter_config.json", lambda c: c.update(peft_type="LORA")), "LORA"),
    "expert missing": (edit_tensors(ADAPTER, lambda t: t.pop(f"{UP}B.weight")), "lacks mue_B"),
    "adapter of another base": (
        edit_tensors(
            ADAPTER,
            lambda t: t.update({f"{UP}{p}.weight": np.zeros((n, 32), np.float32) for p, n in ROWS.items()}),
        ),
        "does not fit the model",
    ),
    "foreign adapter tensor": (edit_tensors(ADAPTER, lambda t: t.update(x=np.zeros((1, 1), np.float32))), "no part"),
    "wrong rank": (edit_json("4-mue/adapter_config.json", lambda c: c.update(r=3)), "of rank 3"),
    "another architecture": (edit_json(CONFIG, lambda c: c.update(architectures=["GPT2Model"])), "GPT2Model"),
    "no rope theta": (edit_json(CONFIG, lambda c: c.pop("rope_parameters")), "rope_theta"),
    "scaled rope": (edit_json(CONFIG, lambda c: c["rope_parameters"].update(rope_type="dynamic")), "dynamic"),
    "no head_dim": (edit_json(CONFIG, lambda c: c.update(head_dim=None)), "head_dim"),
    "wrong pre-tokenizer": (
        edit_json(TOKENIZER, lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+|\s+")),
        "pre-tokenizer",
    ),
    "byte-level expression on": (
        edit_json(TOKENIZER, lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True)),
        "pre-tokenizer",
    ),
    "other normalizer": (edit_json(TOKENIZER, lambda t: t.update(normalizer={"type": "NFKC"})), "NFKC"),
    "no merges": (edit_json(TOKENIZER, lambda t: t["model"].update(merges=[])), "no merges"),
    "byte missing": (edit_json(TOKENIZER, lambda t: t["model"]["vocab"].pop("Ċ")), "byte tokens are missing"),
    "more tokens than rows": (
        edit_json(TOKENIZER, lambda t: t["model"]["vocab"].update({"zz": 5000})),
        "ids up to 5000",
    ),
    "repeated token": (
        edit_json(TOKENIZER, lambda t: t["added_tokens"].append({"id": 701, "content": "A", "special": False})),
        "two ids",
    ),
    "two tokens, one id": (edit_json(TOKENIZER, lambda t: t["model"]["vocab"].update(zz=300)), "the id of another"),
    "merge of no tokens": (edit_json(TOKENIZER, lambda t: t["model"]["merges"].append(["zz", "qq"])), "cannot be read"),
    "half a character": (
        edit_json(TOKENIZER, lambda t: t["model"]["vocab"].update({"\ud83d": 703})),
        "not readable JSON",
    ),
    "no eos": (edit_json("3-dfpo/tokenizer_config.json", lambda c: c.pop("eos_token")), "eos_token"),
    "no chat template": (lambda run: (run / "3-dfpo/chat_template.jinja").unlink(), "chat template"),
    "template is no text": (
        lambda run: (
            (run / "3-dfpo/chat_template.jinja").unlink(),
            edit_json("3-dfpo/tokenizer_config.json", lambda c: c.update(chat_template={"default": "x"}))(run),
        ),
        "is a dict, no text",
    ),
    "template refuses the dialogues": (
        lambda run: (run / "3-dfpo/chat_template.jinja").write_text(
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        ),
        "no system",
    ),
    "template marks no answer": (
        lambda run: (run / "3-dfpo/chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        "drops or repeats a message",
    ),
    "unknown contract": (edit_json("prompts.json", lambda p: p.update(contract=9)), "contract 9"),
    "name that is a path": (edit_json("run.json", lambda r: r.update(name="../x")), "--name"),
    "prompts incomplete": (edit_json("prompts.json", lambda p: p.pop("phrases")), "phrases"),
    "broken JSON": (lambda run: (run / "run.json").write_text("{"), "not readable JSON"),
    "deep JSON": (lambda run: (run / CONFIG).write_text("[" * 100_000), "not readable JSON"),
    "wrong encoding": (lambda run: (run / "prompts.json").write_bytes("{儿}".encode("gb18030")), "not readable JSON"),
    "no calibration": (lambda run: (run / "calibration.jsonl").unlink(), "calibration.jsonl is missing"),
    "calibration empty": (lambda run: (run / "calibration.jsonl").write_text("\n"), "no dialogue"),
    "calibration broken": (lambda run: (run / "calibration.jsonl").write_text('{"messages": [{}]}'), "line 1"),
    "not finite": (
        edit_tensors(MODEL, lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__((3, 3), np.inf)),
        "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refuses(case: str, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = CASES[case]
    damage(damaged)
    assert cli.main([str(damaged), "--output", str(tmp_path / "dist")]) == 2
    captured = capsys.readouterr()
    assert words in " ".join(captured.err.split())
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no folder nowhere"),
        ([], "required"),
        (["x", "--quant", "Q3_K"], "Q8_0"),
        (["x", "--merge", "best"], "usage"),
        (["x", "--name", "../up"], "letters, digits"),
    ],
)
def test_wrong_use(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_output_must_not_be_a_file(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dist").write_text("mine")
    assert cli.main([str(tiny), "--output", str(tmp_path / "dist"), "--force"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "dist").read_text() == "mine"


def test_output_inside_a_file_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main([str(tiny), "--output", str(tmp_path / "file" / "dist")]) == 2
    assert "Traceback" not in capsys.readouterr().err
