"""The speed benchmarks run whole on the smallest sizes and report sane figures; none of their times is judged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trainer.corpus.cards import load_cards

ROOT = Path(__file__).parent.parent
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The entry script with the parts that it imports from its own folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training  # pyright: ignore[reportMissingImports]

    return training


def _layers(of_mue: dict[str, float]) -> dict[str, Any]:
    return {"device": "cpu", "shapes": {"gate/up": {"MUE": of_mue}, "down": {"MUE": of_mue}}}


def test_sft_throughput_trains_both_sides_on_the_same_tokens(training: ModuleType) -> None:
    sft = training.sft_throughput
    figures = sft.run("cpu", short=9, passages=8, rounds=1, shape=TINY)

    assert set(figures["dialogues"]) == {sft.QUESTIONS, sft.PASSAGES}
    for found in figures["dialogues"].values():
        ours, theirs = found["variants"][sft.OURS], found["variants"][sft.TRL]
        assert ours["tokens"] == theirs["tokens"] > 0
        assert ours["steps"] == theirs["steps"]
        assert ours["over_trl"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    assert figures["dialogues"][sft.QUESTIONS]["variants"][sft.OURS]["steps"] == math.ceil(9 / 8)
    assert [len(row) for row in sft.rows(figures)] == [len(sft.COLUMNS)] * 4


def test_the_gpu_settings_train_the_same_tokens(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a processor: packs, rows in batches and TRL's rows, accumulated to steps of like size."""
    sft = training.sft_throughput
    load, theirs = sft.load_recipe, sft.trl_trainer
    monkeypatch.setattr(sft, "load_recipe", lambda path, keys: load(path, [*keys, "device=cpu"]))
    monkeypatch.setattr(sft, "trl_trainer", lambda *given: theirs(*given[:3], "cpu", given[4]))
    folders, tokenizer = sft.build_data(tmp_path, 12, 2)
    sft.write_base(tmp_path / "base", TINY, tokenizer, "cpu")
    grouped = next(variant for variant in sft.ABLATIONS["cuda"] if "packing=false" in variant.overrides)
    found = sft.measure(tmp_path / "base", folders[sft.QUESTIONS], "cuda", [sft.Variant(sft.OURS), grouped], 1)

    assert len({figure["tokens"] for figure in found["variants"].values()}) == 1
    assert len(found["variants"]) == 3


def test_every_ablation_is_a_recipe_and_differs_from_ours_in_its_settings(training: ModuleType) -> None:
    sft = training.sft_throughput
    for device, variants in sft.ABLATIONS.items():
        ours = sft.recipe_of(sft.Variant(sft.OURS), Path("base"), device)
        assert not ours.stages.sft.activation_checkpointing
        for variant in variants:
            changed = sft.recipe_of(variant, Path("base"), device)
            assert changed != ours or not variant.grouped, variant.name


def test_an_optimiser_step_has_as_many_rows_on_both_sides(training: ModuleType) -> None:
    sft = training.sft_throughput
    cpu = sft.recipe_of(sft.Variant(sft.OURS), Path("base"), "cpu").stages.sft
    assert sft.rows_in_a_step(cpu, 150.0) == 8
    packs = cpu.model_copy(update={"packing": True, "max_length": 1024})
    assert sft.rows_in_a_step(packs, 128.0) == 8 * 8


def test_trl_is_left_at_its_defaults(training: ModuleType, tmp_path: Path) -> None:
    sft = training.sft_throughput
    folders, tokenizer = sft.build_data(tmp_path, 4, 4)
    sft.write_base(tmp_path / "base", TINY, tokenizer, "cpu")
    arguments = sft.trl_trainer(tmp_path / "base", folders[sft.QUESTIONS], tmp_path, "cpu", 1).args

    assert (arguments.per_device_train_batch_size, arguments.max_length) == (8, 1024)
    assert arguments.activation_checkpointing
    assert arguments.bf16
    assert not arguments.packing
    assert arguments.train_sampling_strategy == "random"


def test_questions_have_the_lengths_of_short_dialogues(training: ModuleType) -> None:
    cards = load_cards(ROOT / "tui/library/cards")
    drawn = list(training.sft_throughput.questions(cards, 300, seed=1))
    lengths = sorted(sum(len(message.content) for message in record.messages or ()) for record in drawn)

    assert lengths[0] < 60
    assert 80 < lengths[150] < 160
    assert lengths[-1] > 250
    assert drawn == list(training.sft_throughput.questions(cards, 300, seed=1))


def test_gpu_stages_train_what_they_plan_on_a_processor_too(training: ModuleType) -> None:
    stages = training.gpu_stages
    settings = ("no recomputation", "no recomputation, rows grouped")
    figures = stages.run(
        "cpu", steps=1, overrides=["dtype=float32"], shape=TINY, dialogues=6, settings=settings
    )  # fmt: skip

    assert set(figures["stages"]) == {"sft", "mue"}
    for found in figures["stages"].values():
        assert set(found) == set(settings)
        for figure in found.values():
            assert figure["tokens_per_second"] > 0
            assert figure["planned_bytes"] > 0
            assert figure["mfu"] is None
    assert [len(row) for row in stages.rows(figures)] == [len(stages.COLUMNS)] * 4


def test_gpu_stages_name_settings_that_do_not_fit(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = training.gpu_stages
    small = stages.find_device
    monkeypatch.setattr(
        stages, "find_device", lambda recipe, _: small(recipe.model_copy(update={"device": "auto"}), 0.5)
    )
    figures = stages.run("cpu", steps=1, shape=TINY, dialogues=6, settings=("no recomputation",))

    assert "does not fit" in figures["stages"]["sft"]["no recomputation"]["note"]
    assert training.gpu_goals(figures) == []


def test_goals_are_judged_in_their_own_direction(training: ModuleType) -> None:
    good = {"speedup_over_published": 1.5, "saved_less_than_published": 100.0, "time_over_lora": 1.15}
    assert all(goal.held for goal in training.layer_goals(_layers(good)))
    bad = {"speedup_over_published": 1.4, "saved_less_than_published": 99.0, "time_over_lora": 1.2}
    assert not any(goal.held for goal in training.layer_goals(_layers(bad)))
    gpu = {"stages": {"sft": {"a": {"mfu": 0.4, "peak_over_plan": 0.8}, "b": {"mfu": 0.5, "peak_over_plan": 1.1}}}}
    assert [goal.held for goal in training.gpu_goals(gpu)] == [True, False, True]


def test_the_entry_prints_one_json_object_and_a_quick_run_is_not_judged(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"gate/up": (16, 24), "down": (24, 16)}
    monkeypatch.setattr(training.mue_layer, "SHAPES", sizes)
    monkeypatch.setattr(training.sft_throughput, "SMALL", TINY)
    monkeypatch.setattr("sys.argv", ["training.py", "--device", "cpu", "--quick", "--json"])

    assert training.main() == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"mue_layer", "sft_throughput", "goals"}
    assert {goal["figure"] for goal in figures["goals"]} == {
        "speed over the published", "activations saved, times less", "time over LoRA of equal rank",
        "useful tokens/s over TRL's defaults",
    }  # fmt: skip
    assert all(math.isfinite(goal["measured"]) for goal in figures["goals"])


def test_cuda_without_a_gpu_is_one_message(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["training.py", "--device", "cuda"])
    assert training.main() == 2
    assert "--device cpu" in capsys.readouterr().err
