"""Merges as files, through the libraries that read them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from peft import PeftModel
from tiny_models import llama_cpp_logits, make_baichuan, save_random

from quantize import cli, task_adapters, writer
from quantize.architectures import for_config
from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput
from quantize.live import Live
from quantize.merging.adapters import save_lora, write_gguf
from quantize.merging.collect import least_squares
from quantize.merging.factors import Merge, difference
from quantize.run_folder import RunFolder

CHILD = Path(__file__).with_name("adapter_logits.py")


def random_merge(checkpoint: Checkpoint, modules: list[str], rank: int = 3) -> Merge:
    random = np.random.default_rng(5)
    shapes = {module: checkpoint.tensors.shape(f"{module}.weight") for module in modules}
    return Merge(
        "random",
        {
            module: (
                random.normal(size=(rank + number % 2, shape[1])).astype(np.float32) * 0.1,
                random.normal(size=(shape[0], rank + number % 2)).astype(np.float32) * 0.1,
            )
            for number, (module, shape) in enumerate(shapes.items())
        },
    )


def adapted_logits(model: Path, adapter: Path, ids: list[int]) -> np.ndarray:
    output = adapter.with_suffix(".npy")
    command = [sys.executable, str(CHILD), str(model), str(adapter), str(output), *map(str, ids)]
    subprocess.run(command, check=True, capture_output=True)
    return np.load(output)


def folded_logits(folder: Path, merge: Merge, ids: list[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for module in merge:
            delta = merge.delta_rows(module, slice(None))
            model.get_submodule(module).weight.add_(torch.from_numpy(delta))  # type: ignore[operator]
        return model(torch.tensor([ids])).logits[0].numpy()


def test_task_adapters_on_the_merged_file_give_the_task_models_logits(tiny: Path, tmp_path: Path) -> None:
    live = Live(tiny / "3-dfpo", tiny / "4-mue")
    tokenised = live.tokenise(RunFolder.open(tiny).calibration)
    merge = least_squares(live, tokenised, tmp_path, lambda *_: None)
    task = least_squares(live, tokenised[:1], tmp_path, lambda *_: None, prior=merge)
    checkpoint = Checkpoint(tiny / "3-dfpo")
    architecture = for_config(checkpoint.config)
    plans = architecture.plan(checkpoint.config)
    model, adapter = tmp_path / "model.gguf", tmp_path / "task.gguf"
    metadata = architecture.metadata(checkpoint.config) | {
        "qwen3.vocab_size": checkpoint.config["vocab_size"],
        "tokenizer.ggml.model": "none",
    }
    weights = writer.Weights(checkpoint.tensors, merge)
    writer.write(model, architecture.NAME, metadata, plans, weights, "F32", lambda *_: None)
    write_gguf(adapter, difference(task, merge), architecture.NAME, plans, "task")
    ids = tokenised[0].ids[:48]
    expected, other = (folded_logits(tiny / "3-dfpo", each, ids) for each in (task, merge))
    found = adapted_logits(model, adapter, ids)
    assert np.abs(found - expected).max() < 1e-3 * expected.std()
    assert np.abs(found - other).max() > 1e-2 * expected.std()


def test_rows_of_queries_and_keys_are_turned_as_in_the_model(tmp_path: Path) -> None:
    """Llama's attention with grouped heads: the adapter's B must take the order of the GGUF's rows."""
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    folder = save_random(transformers.LlamaForCausalLM(config), tmp_path / "model")
    checkpoint = Checkpoint(folder)
    architecture = for_config(checkpoint.config)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    merge = random_merge(checkpoint, [f"model.layers.{number}.{name}" for number in (0, 1) for name in names])
    ids = np.random.default_rng(1).integers(3, 160, 32).tolist()
    llama_cpp_logits(folder, tmp_path, ids)
    adapter = tmp_path / "adapter.gguf"
    write_gguf(adapter, merge, architecture.NAME, architecture.plan(checkpoint.config), "random")
    expected = folded_logits(folder, merge, ids)
    assert np.abs(adapted_logits(tmp_path / "model.gguf", adapter, ids) - expected).max() < 1e-3 * expected.std()


def test_a_packed_matrix_gets_one_adapter_for_each_part(tmp_path: Path) -> None:
    """Baichuan's W_pack: queries, keys and values, each with its rows as the model's file has them."""
    make_baichuan(tmp_path / "model", layers=32, vocabulary=160, heads=4, z_loss_weight=0)
    checkpoint = Checkpoint(tmp_path / "model")
    architecture = for_config(checkpoint.config)
    plans = architecture.plan(checkpoint.config)
    module = "model.layers.0.self_attn.W_pack"
    merge = random_merge(checkpoint, [module])
    file = tmp_path / "adapter.gguf"
    write_gguf(file, merge, architecture.NAME, plans, "random")
    reader = GGUFReader(file)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 6
    before, after = (writer.Weights(checkpoint.tensors, each) for each in (None, merge))
    for plan in (plan for plan in plans if plan.source == f"{module}.weight"):
        added = after.rows(plan, 0, plan.shape[0]) - before.rows(plan, 0, plan.shape[0])
        product = tensors[f"{plan.name}.lora_b"] @ tensors[f"{plan.name}.lora_a"]
        np.testing.assert_allclose(product, added, atol=1e-6)
    fields = {name: reader.fields[name].contents() for name in ("general.type", "adapter.type")}
    assert fields == {"general.type": "adapter", "adapter.type": "lora"}
    with pytest.raises(BadInput, match="another base"):
        write_gguf(tmp_path / "other.gguf", merge, architecture.NAME, plans[:2], "random")


def test_peft_loads_the_saved_lora_and_computes_the_same(tiny: Path, tmp_path: Path) -> None:
    """Layers of unequal rank too."""
    modules = [f"model.layers.{number}.{name}" for number in (0, 1) for name in ("mlp.up_proj", "self_attn.q_proj")]
    merge = random_merge(Checkpoint(tiny / "3-dfpo"), modules)
    save_lora(merge, tmp_path / "lora", "tiny")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny / "3-dfpo", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    ids = list(range(5, 40))
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].numpy()
    expected = folded_logits(tiny / "3-dfpo", merge, ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - folded_logits(tiny / "3-dfpo", Merge("none", {}), ids)).max() > 0.01


def test_an_export_writes_adapters_that_were_checked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Right ones are published; one with rows in another order fails its gate, and nothing gets a name."""
    arguments = [str(tiny), "--task-adapters", "--json", "--output"]
    assert cli.main([*arguments, str(tmp_path / "good")]) == 0
    gates = {gate["name"]: gate for gate in json.loads(capsys.readouterr().out)["gates"]}
    assert {path.name for path in (tmp_path / "good/adapters").iterdir()} == {
        "diagnosis.gguf", "knowledge.gguf", "treatment.gguf",
    }  # fmt: skip
    assert gates["adapter_diagnosis"]["value"] < 1e-6
    write = task_adapters.write_gguf

    def turned(path: Path, merge: Merge, *rest: object) -> None:
        layers = {name: (a, np.ascontiguousarray(b[::-1])) for name in merge for a, b in [merge.factors(name)]}
        write(path, Merge("turned", layers), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(task_adapters, "write_gguf", turned)
    assert cli.main([*arguments, str(tmp_path / "bad")]) == 1
    assert "adapter_diagnosis (F32)" in json.loads(capsys.readouterr().out)["failed"]
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["fidelity.json"]
