"""Merging a whole model, and the report on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import Qwen3ForCausalLM

from quantize import header, writer
from quantize.architectures import for_config
from quantize.checkpoint import Checkpoint
from quantize.errors import BadInput
from quantize.live import Live
from quantize.merging import collect, merge_sentence
from quantize.merging.collect import least_squares
from quantize.merging.experts import Adapter
from quantize.merging.factors import Merge, difference
from quantize.merging.merge import Merged, merge_experts
from quantize.merging.table import merge_rows
from quantize.run_folder import Dialogue, RunFolder

QUESTIONS = ["发热", "咳嗽", "腹泻", "皮疹", "呕吐", "头痛", "鼻塞", "便秘", "贫血", "哮喘", "惊厥", "黄疸"]
TASKS = ("knowledge", "diagnosis", "treatment")


def dialogues(start: int, stop: int) -> list[Dialogue]:
    """Of all three tasks in turn."""
    return [
        Dialogue(
            TASKS[number % 3],
            [
                {"role": "user", "content": f"孩子{QUESTIONS[number % 12]}{number}天怎么办？"},
                {"role": "assistant", "content": f"{QUESTIONS[(number * 5 + 1) % 12]}要紧，{number}次后请就医。"},
            ],
        )
        for number in range(start, stop)
    ]


def merge_of(run: Path, method: str = "least-squares", **options: Any) -> tuple[Live, Merged]:
    live = Live(run / "3-dfpo", run / "4-mue")
    adapter = Adapter(run / "4-mue")
    given = {"calibration": dialogues(0, 12), "held_out": dialogues(12, 18), **options}
    return live, merge_experts(live, adapter, method=method, work=run, progress=lambda *_: None, **given)


def rewrite(run: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    file = run / "4-mue/adapter_model.safetensors"
    save_file({name: np.ascontiguousarray(change(name, t)) for name, t in load_file(file).items()}, file)


@pytest.fixture(scope="module")
def merged(tiny: Path) -> tuple[Live, Merged]:
    return merge_of(tiny)


def test_each_layer_is_the_best_for_the_inputs_it_gets(tiny: Path) -> None:
    """lstsq on the inputs of every layer of the merged model itself, from the checkpoint's own forward pass."""
    live = Live(tiny / "3-dfpo", tiny / "4-mue")
    tokenised = live.tokenise(dialogues(0, 12))
    merge = least_squares(live, tokenised, tiny, lambda *_: None, damping=1e-9, context_weight=0.25)
    weight = np.concatenate([np.where([*d.assistant[1:], False], 1.0, 0.25) for d in tokenised])
    root = np.sqrt(weight)[:, None]
    model = folded(tiny, merge)
    file = load_file(tiny / "4-mue/adapter_model.safetensors")
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"):
        x = inputs_of(model, module, [d.ids for d in tokenised])
        a, b, route = (
            file[f"base_model.model.{module}.mue_{part}.weight"].astype(float) for part in ("A", "B", "route")
        )
        gates = np.exp(x @ route.T)
        rows = np.repeat(np.c_[np.ones(len(x)), gates / gates.sum(1, keepdims=True)], 2, axis=1)
        hidden = (x @ a.T) * rows
        best = np.linalg.lstsq(root * x, root * hidden, rcond=None)[0]
        found = x @ merge.factors(module)[0].T.astype(float)
        excess = ((root * (hidden - found)) ** 2).sum() / ((root * (hidden - x @ best)) ** 2).sum()
        assert 1 - 1e-6 < excess < 1 + 1e-4
        np.testing.assert_allclose(merge.factors(module)[1], 2 * b, rtol=1e-6)  # alpha / r = 2


def inputs_of(model: nn.Module, module: str, sequences: list[list[int]]) -> np.ndarray:
    found: list[torch.Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda _m, args, _out: found.append(args[0][0]))
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([ids]))
    handle.remove()
    return torch.cat(found).double().numpy()


def dense(merge: Merge, module: str) -> np.ndarray:
    delta = merge.delta_rows(module, slice(None))
    assert delta is not None
    return delta


def folded(run: Path, merge: Merge) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM.from_pretrained(run / "3-dfpo", dtype=torch.float32)
    with torch.no_grad():
        for module in merge:
            model.get_submodule(module).weight.add_(torch.from_numpy(dense(merge, module)))  # type: ignore[union-attr]
    return model


def test_exported_weights_give_the_merged_models_logits(
    tiny: Path, merged: tuple[Live, Merged], tmp_path: Path
) -> None:
    """Live model with the merge beside it, and a model whose weights were read from the written file."""
    live, result = merged
    checkpoint = Checkpoint(tiny / "3-dfpo")
    architecture = for_config(checkpoint.config)
    plans = architecture.plan(checkpoint.config)
    file = tmp_path / "model.gguf"
    weights = writer.Weights(checkpoint.tensors, result.merge)
    metadata = architecture.metadata(checkpoint.config)
    writer.write(file, architecture.NAME, metadata, plans, weights, "F32", lambda *_: None)
    written = header.read(file)
    model = Qwen3ForCausalLM.from_pretrained(tiny / "3-dfpo", dtype=torch.float32)
    state = {p.source: torch.from_numpy(np.array(written.rows(p.name, 0, p.shape[0]))).reshape(p.shape) for p in plans}
    model.load_state_dict(state, strict=False)
    tokenised = live.tokenise(dialogues(12, 14))
    with torch.no_grad():
        for dialogue in tokenised:
            with live.merged(live.tensors(result.merge)):
                expected = live.model(live.ids(dialogue)).logits
            torch.testing.assert_close(model(live.ids(dialogue)).logits, expected, rtol=0, atol=1e-4)


def test_least_squares_is_nearer_to_the_live_model_than_constants(merged: tuple[Live, Merged]) -> None:
    report = merged[1].report
    assert report is not None
    table = {row["name"]: row for row in report["table"]}
    assert list(table) == ["base", "universal", "uniform", "usage", "least-squares", "per task", "live"]
    assert table["least-squares"]["kld"] < table["usage"]["kld"] < table["base"]["kld"]
    assert table["least-squares"]["layer_error"] < table["usage"]["layer_error"] < 1
    assert table["live"]["kld"] == pytest.approx(0, abs=1e-7)
    assert table["live"]["top1"] == 1
    assert set(table["usage"]["nll_by_task"]) == set(TASKS)
    json.dumps(report)
    assert len(merge_rows(report)) == 8


def test_figures_are_those_of_transformers_own_loss(tiny: Path, merged: tuple[Live, Merged]) -> None:
    """Base and merged model through `labels`, weighted by tokens."""
    live, result = merged
    assert result.report is not None
    base = Qwen3ForCausalLM.from_pretrained(tiny / "3-dfpo", dtype=torch.float32)
    for model, figure in ((base, "nll_base"), (folded(tiny, result.merge), "nll_merged")):
        total, count = 0.0, 0
        for dialogue in live.tokenise(dialogues(12, 18)):
            marked = [i if mark else -100 for i, mark in zip(dialogue.ids, dialogue.assistant, strict=True)]
            tokens = sum(dialogue.assistant)
            loss = model(input_ids=torch.tensor([dialogue.ids]), labels=torch.tensor([marked])).loss
            total, count = total + loss.item() * tokens, count + tokens
        assert result.report[figure] == pytest.approx(total / count, abs=1e-5)
    assert result.report["tokens"] == count


@pytest.mark.parametrize("method", ["usage", "least-squares"])
def test_with_constant_gates_merging_loses_nothing(damaged: Path, method: str) -> None:
    rewrite(damaged, lambda name, tensor: np.zeros_like(tensor) if "route" in name else tensor)
    report = merge_of(damaged, method)[1].report
    assert report is not None
    assert report["nll_merged"] == pytest.approx(report["nll_live"], abs=1e-5)
    assert report["nll_base"] != pytest.approx(report["nll_live"], abs=1e-3)
    assert report["table"][-2]["kld"] < 1e-6


def test_hidden_states_on_disk_change_nothing(
    tiny: Path, tmp_path: Path, merged: tuple[Live, Merged], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, result = merged
    monkeypatch.setattr(collect, "_IN_MEMORY", 0)
    again = least_squares(live, live.tokenise(dialogues(0, 12)), tmp_path, lambda *_: None)
    assert (tmp_path / "hidden.states").stat().st_size > 0
    for module in again:
        np.testing.assert_array_equal(again.factors(module)[0], result.merge.factors(module)[0])


def test_the_difference_of_two_merges_leads_from_one_to_the_other(tiny: Path, merged: tuple[Live, Merged]) -> None:
    """With a shared B the rank stays; after a reduction the ranks add up."""
    merge, tasks = merged[1].merge, merged[1].tasks
    reduced = merge_of(tiny, rank=3, tasks=False)[1].merge
    assert set(tasks) == set(TASKS)
    for present, rank in ((merge, 8), (reduced, 11)):
        step = difference(tasks["diagnosis"], present)
        for module in merge:
            before, added, wanted = (dense(m, module) for m in (present, step, tasks["diagnosis"]))
            np.testing.assert_allclose(before + added, wanted, atol=1e-5 * np.abs(wanted).max())
            assert step.factors(module)[0].shape[0] == rank


def test_reduced_rank_costs_little_by_little(tiny: Path) -> None:
    errors = []
    for rank in (1, 4, 8):
        result = merge_of(tiny, rank=rank, tasks=False)[1]
        assert result.report is not None
        assert {result.merge.factors(module)[0].shape[0] for module in result.merge} == {rank}
        errors.append({row["name"]: row for row in result.report["table"]}["least-squares"]["layer_error"])
    assert errors[0] > errors[1] > errors[2]


def test_without_held_out_dialogues_every_third_is_kept_out_of_the_fit(tiny: Path) -> None:
    report = merge_of(tiny, "usage", held_out=[])[1].report
    assert report is not None
    assert (report["dialogues"], report["calibration_dialogues"]) == (4, 8)
    assert "4 calibration dialogues kept out of the fit (every third)" in merge_sentence(report)
    # Though the tasks take turns, all of them are measured.
    assert set(report["table"][0]["nll_by_task"]) == set(TASKS)


def test_says_so_when_the_experts_gained_nothing(damaged: Path) -> None:
    rewrite(damaged, lambda name, tensor: np.zeros_like(tensor) if "mue_B" in name else tensor)
    report = merge_of(damaged)[1].report
    assert report is not None
    assert report["kept"] is None
    assert "gained nothing" in merge_sentence(report)


def test_without_dialogues_only_fixed_gates_are_possible(tiny: Path) -> None:
    result = merge_of(tiny, "uniform", calibration=[], held_out=[])[1]
    assert result.report is None
    for method in ("least-squares", "usage"):
        with pytest.raises(BadInput, match=r"needs dialogues.+--calibration.+--merge uniform"):
            merge_of(tiny, method, calibration=[], held_out=[])
    with pytest.raises(BadInput, match="--rank needs --merge least-squares"):
        merge_of(tiny, "usage", rank=2)


def test_run_folders_own_dialogues_are_enough(tiny: Path) -> None:
    run = RunFolder.open(tiny)
    report = merge_of(tiny, calibration=run.calibration, held_out=run.held_out)[1].report
    assert report is not None
    assert report["dialogues"] > 0
