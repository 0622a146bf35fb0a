"""`plan`: tokens and steps against the real trainers, verdicts and advice that hold, one message for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PreTrainedTokenizerFast

from trainer import plan as planner
from trainer.commands import plan as command
from trainer.origin import model_config, new_model
from trainer.planning import tokens as counting
from trainer.planning.probe import tokens_per_second
from trainer.planning.tokens import count_steps, count_tokens
from trainer.recipe import PROJECT, STAGES, RecipeError, load_recipe
from trainer.stages.build import stage_records, stage_trainer

TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"
SETTINGS = {
    "as it is": [],
    "cut": [
        "stages.cpt.max_length=40",
        "stages.cpt.gradient_accumulation=3",
        "stages.cpt.epochs=2.5",
        "stages.sft.max_length=200",
        "stages.dfpo.max_length=300",
        "stages.mue.max_length=300",
    ],
    "packed": [
        "stages.cpt.packing=true",
        "stages.cpt.max_length=100",
        "stages.sft.max_length=160",
        "stages.dfpo.max_length=400",
        "stages.mue.max_steps=7",
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A base of which only the configuration and the tokenizer are there: a plan needs no weights."""
    folder = tmp_path_factory.mktemp("base")
    model_config(load_recipe(TINY), len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _based(folder: Path, target: Path, *lines: str) -> Path:
    """A recipe over a base."""
    text = TINY.read_text(encoding="utf-8")
    head, _, rest = text.partition("tokenizer:")
    _, _, stages = rest.partition("stages:")
    target.write_text(f"{head}base: {folder}\nstages:{stages}" + "\n".join(lines), encoding="utf-8")
    return target


# --- tokens


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", STAGES)
def test_counts_are_those_of_the_real_trainer(
    name: str, setting: str, corpus: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = load_recipe(TINY, ["loggers=[]", *SETTINGS[setting]])
    dfpo = recipe.stages.dfpo.model_copy(update={"precompute_reference": False})
    live = recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"dfpo": dfpo})})
    trainer = stage_trainer(name, new_model(recipe, tokenizer), tokenizer, live, corpus, tmp_path)
    loader = trainer.get_train_dataloader()
    tokens = scored = positions = 0
    for batch in loader:
        positions += batch["input_ids"].numel()
        tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        counted = batch["completion_mask"] if name == "dfpo" else batch["labels"] != -100
        scored += int(counted[:, 1:].sum())
    found = count_tokens(recipe, name, stage_records(name, corpus), tokenizer)
    assert (found.tokens, found.scored) == (tokens, scored)
    assert found.packs or found.rows == len(trainer.train_dataset)
    assert found.packs is None or found.packs == len(trainer.train_dataset)
    assert found.padding == pytest.approx(1 - tokens / positions)
    assert found.steps == trainer.set_initial_training_values(trainer.args, loader)[-1]


def test_what_truncation_costs(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = count_tokens(
        load_recipe(TINY, ["stages.sft.max_length=4096"]), "sft", stage_records("sft", corpus), tokenizer
    )
    recipe = load_recipe(TINY, SETTINGS["cut"])
    cut = count_tokens(recipe, "sft", stage_records("sft", corpus), tokenizer)
    assert whole.dropped_tokens == whole.dropped_rows == 0
    assert cut.tokens + cut.dropped_tokens == whole.tokens
    assert cut.rows + cut.dropped_rows == whole.rows == cut.records
    assert cut.dropped_rows > 0
    # CPT cuts long texts into rows, so its packs lose nothing.
    packed = load_recipe(TINY, [*SETTINGS["packed"], "stages.cpt.copy_exercises=0"])
    texts = count_tokens(packed, "cpt", stage_records("cpt", corpus), tokenizer)
    assert texts.rows > texts.records
    assert texts.dropped_tokens == 0


def test_a_large_corpus_is_sampled_and_scaled(
    corpus: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, records = load_recipe(TINY), stage_records("cpt", corpus)
    every = count_tokens(recipe, "cpt", records, tokenizer)
    monkeypatch.setattr(counting, "SAMPLE", len(records) // 2)
    half = count_tokens(recipe, "cpt", records, tokenizer)
    assert (half.sampled, half.records) == (every.records // 2, every.records)
    assert half.rows == every.rows
    assert half.tokens == pytest.approx(every.tokens, rel=0.2)


def test_nothing_left_to_train_on_is_an_error_with_its_remedy(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = load_recipe(TINY, ["stages.dfpo.max_length=20"])
    with pytest.raises(RecipeError, match=r"no answer is left. Raise stages\.dfpo\.max_length"):
        count_tokens(recipe, "dfpo", stage_records("dfpo", corpus), tokenizer)
    with pytest.raises(RecipeError, match=r"corpus\.preferences"):
        count_tokens(recipe, "dfpo", [], tokenizer)


@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (160, 3), (161, 4), (7, 8)])
def test_steps_on_several_processes_are_accelerates(rows: int, processes: int) -> None:
    stage = load_recipe(TINY, ["stages.sft.batch_size=4", "stages.sft.gradient_accumulation=3"]).stages.sft
    shards = [
        len(BatchSamplerShard(BatchSampler(SequentialSampler(range(rows)), 4, False), processes, index))
        for index in range(processes)
    ]
    assert count_steps(stage, rows, processes) == -(-max(shards) // 3)


# --- plan


def test_plan_of_the_tiny_recipe(corpus: Path) -> None:
    plan = planner.plan(load_recipe(TINY), corpus, gpu_memory=24)
    assert list(plan.stages) == list(STAGES)
    assert plan.fitting == ["single"]
    assert plan.fits
    assert plan.stages["cpt"].trainable == plan.parameters
    assert plan.stages["mue"].parameters == plan.parameters + plan.stages["mue"].trainable
    assert 0 < plan.stages["mue"].trainable < plan.parameters
    assert all(stage.speed is None for stage in plan.stages.values())


def test_strategies_for_several_gpus(corpus: Path) -> None:
    one, eight = (planner.plan(load_recipe(TINY), corpus, processes, 24) for processes in (1, 8))
    assert set(one.stages["cpt"].memory) == {"single"}
    assert set(eight.stages["cpt"].memory) == {"ddp", "fsdp2", "zero3"}
    assert eight.stages["cpt"].tokens.steps < one.stages["cpt"].tokens.steps


def test_a_processor_recipe_is_held_against_the_ram(corpus: Path) -> None:
    plan = planner.plan(load_recipe(TINY, ["device=cpu"]), corpus, 2)
    assert not plan.device.gpu
    assert set(plan.stages["cpt"].memory) == {"ddp"}


def test_advice_brings_every_stage_into_the_gpu(corpus: Path, base: Path, tmp_path: Path) -> None:
    """Every step says what it brings, and the recipe with all of them fits as promised and learns the same."""
    file, size = _based(base, tmp_path / "based.yaml"), 0.8
    plan = planner.plan(load_recipe(file), corpus, gpu_memory=size)
    assert not plan.fits
    steps = [step for step in plan.advice if step.stage == "dfpo" and step.changes]
    needs = [step.memory.total for step in steps]
    assert needs == sorted(needs, reverse=True)
    assert [step.fits for step in steps] == [False] * (len(steps) - 1) + [True]
    changed = planner.plan(load_recipe(file, plan.overrides), corpus, gpu_memory=size)
    assert changed.fits
    assert changed.stages["dfpo"].memory["single"] == steps[-1].memory
    # Smaller batches, more of them: the same steps.
    assert [s.tokens.steps for s in changed.stages.values()] == [s.tokens.steps for s in plan.stages.values()]


def test_advice_for_one_stage_leaves_the_others_alone(corpus: Path, base: Path, tmp_path: Path) -> None:
    """A key changed in one stage would be inherited by the next."""
    small = [f"stages.{name}.batch_size=1" for name in ("sft", "dfpo", "mue")]
    file, large = _based(base, tmp_path / "based.yaml"), ["stages.cpt.batch_size=128", *small]
    recipe = load_recipe(file, large)
    need = planner.plan(recipe, corpus, gpu_memory=24).stages["cpt"].memory["single"].total
    plan = planner.plan(recipe, corpus, gpu_memory=need / planner.GIB)
    assert {step.stage for step in plan.advice} == {"cpt"}
    assert "stages.sft.gradient_accumulation=1" in plan.overrides
    changed = load_recipe(file, [*large, *plan.overrides])
    assert changed.stages.cpt != recipe.stages.cpt
    assert all(changed.stage(name) == recipe.stage(name) for name in ("sft", "dfpo", "mue"))


def test_new_models_are_not_advised_to_train_adapters(corpus: Path) -> None:
    plan = planner.plan(load_recipe(TINY), corpus, gpu_memory=0.6)
    assert plan.advice
    assert not any({"method", "load_in_4bit"} & set(step.changes) for step in plan.advice)


# --- probe


@pytest.mark.parametrize("name", STAGES)
def test_probe_trains_every_stage_here(name: str, corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    small = [f"stages.{stage}.batch_size=1" for stage in STAGES]
    recipe = load_recipe(TINY, [*small, "stages.sft.packing=true", "stages.dfpo.precompute_reference=false"])
    tokens = count_tokens(recipe, name, stage_records(name, corpus), tokenizer)
    assert tokens_per_second(recipe, name, model_config(recipe, len(tokenizer)), tokens, "cpu", 0.0) > 0


def test_time_follows_from_the_rate(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "tokens_per_second", lambda *_: 100.0)
    recipe = load_recipe(TINY, ["stages.cpt.epochs=3", "stages.mue.max_steps=2", "stages.mue.batch_size=4"])
    plan = planner.plan(recipe, corpus, processes=2, gpu_memory=24, probe=True)

    def tokens(name: str) -> Any:
        speed = plan.stages[name].speed
        assert speed is not None
        return speed.hours * 3600 * 2 * 100

    counts = {name: stage.tokens for name, stage in plan.stages.items()}
    assert tokens("cpt") == pytest.approx(3 * counts["cpt"].tokens)
    assert tokens("dfpo") == pytest.approx(
        counts["dfpo"].tokens * (3 + 1 / 3)
    )  # three inherited epochs, a precomputed reference
    assert tokens("mue") == pytest.approx(2 * 2 * 4 * counts["mue"].mean)


def test_what_does_not_fit_here_is_not_probed(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner.psutil, "virtual_memory", lambda: type("Ram", (), {"available": 1, "total": 1}))
    plan = planner.plan(load_recipe(TINY), corpus, gpu_memory=24, probe=True)
    assert {stage.not_probed for stage in plan.stages.values()} == {"it does not fit into this machine"}


# --- command


def _run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command.main([str(TINY), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_json_holds_the_plan(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run("--corpus", str(corpus), "--json", "--gpu-memory", "24", capsys=capsys)
    plan = json.loads(out)
    assert code == 0
    assert plan["fits"] is True
    assert plan["parameters"] == plan["embeddings"] + plan["non_embedding"]
    memory = plan["stages"]["sft"]["memory"]["single"]
    assert memory["total"] == sum(value for key, value in memory.items() if key in command.PARTS)
    assert plan["disk_bytes"] == sum(plan["disk"]["stages"].values()) + plan["disk"]["checkpoints"]


def test_a_plan_that_does_not_fit_is_exit_code_1(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run("--corpus", str(corpus), "--gpu-memory", "0.6", capsys=capsys)
    assert code == 1
    assert "it does not fit" in out
    assert "stages.sft.batch_size=" in out


def test_the_corpus_is_built_if_it_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = _run("--gpu-memory", "24", capsys=capsys)
    assert code == 0
    assert (tmp_path / "PedCorpus" / "tiny" / "manifest.json").exists()
    assert "full" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stages.sft.bach_size=1"], "did you mean 'batch_size'"),
        (["stages.mue.target_modules=[W_pack]"], "name some of them in stages.mue.target_modules"),
        (["stages.dfpo.max_length=20"], "Raise stages.dfpo.max_length"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(*arguments, "--corpus", str(corpus), "--gpu-memory", "24", capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_missing_base_is_one_message(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _based(tmp_path / "nowhere", tmp_path / "based.yaml")
    assert command.main([str(file), "--corpus", str(corpus)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--processes", "0"], ["--gpu-memory", "-1"]])
def test_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main([str(TINY), *arguments])
    assert exit.value.code == 2
