"""What our loop adds to TRL's trainers, on the real trainers: the stop on bad numbers, whole checkpoints, packing."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState
from trl.trainer.sft_trainer import SFTTrainer

from trainer.corpus.record import Message, Record, Source
from trainer.origin import new_model
from trainer.recipe import PROJECT, Recipe, TokenizerRecipe, load_recipe
from trainer.stages.checkpoints import damaged_file
from trainer.stages.cpt import TextTrainer, cpt_trainer, text_rows
from trainer.stages.fit import fit
from trainer.stages.loop import DiskFull, StageError
from trainer.stages.sft import sft_trainer
from trainer.stages.view import View
from trainer.stages.watch import EarlyStop, Watch
from trainer.tokenizer import train_tokenizer

TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"
TEXTS = [f"第{n}段：" + "发热咳嗽腹泻皮疹"[: n % 8 + 1] * (n % 5 + 1) for n in range(24)]


def _record(number: int, text: str) -> Record:
    source = Source(name="test", licence="Apache-2.0", reference="none")
    return Record(
        id=str(number),
        kind="text",
        task="general",
        source=source,
        age_group="",
        split="train",
        group="g",
        text=text,
    )


def _dialogue(number: int, question: str) -> Record:
    messages = (Message(role="user", content=question), Message(role="assistant", content="答。"))
    return _record(number, "x").model_copy(update={"kind": "dialogue", "text": None, "messages": messages})


RECORDS = [_record(number, text) for number, text in enumerate(TEXTS)]


def _recipe(*changes: str) -> Recipe:
    return load_recipe(TINY, ["loggers=[]", "stages.cpt.copy_exercises=0", "stages.cpt.batch_size=4", *changes])


def _trainer(folder: Path, *changes: str, held_out: Sequence[Record] = ()) -> TextTrainer:
    recipe = _recipe(*changes)
    tokenizer = train_tokenizer(TEXTS, TokenizerRecipe(vocab_size=400), 128)
    model = new_model(recipe, tokenizer)
    return cpt_trainer(model, tokenizer, recipe, RECORDS, held_out, folder / "checkpoints" / "cpt")


def _poison(trainer: TextTrainer, step: int, where: str) -> None:
    """From `step` on the model's output (or its gradient) is not a number."""

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if trainer.state.global_step + 1 < step or not output.requires_grad:
            return None
        if where == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return None

    trainer.model.model.embed_tokens.register_forward_hook(hook)  # type: ignore[union-attr]


@pytest.mark.parametrize(("where", "says"), [("loss", "the loss is nan"), ("gradient", "the gradient's norm is")])
def test_a_number_that_is_none_stops_with_the_batch_and_the_last_good_checkpoint(
    tmp_path: Path, where: str, says: str
) -> None:
    trainer = _trainer(tmp_path, "stages.cpt.save_every=2")
    _poison(trainer, 4, where)
    with pytest.raises(StageError, match=says) as stopped:
        trainer.train()
    message = str(stopped.value)
    assert "step 4" in message
    assert "checkpoint-2" in message
    assert "learning_rate" in message
    rows = message.split("rows ")[1].split(";")[0].split(", ")
    written = json.loads((tmp_path / "checkpoints" / "cpt" / "batch-4.json").read_text(encoding="utf-8"))
    texts = {text.replace("<|endoftext|>", "").replace("<|im_end|>", "") for text in written["texts"]}
    assert texts == {TEXTS[int(row)] for row in rows}, "the rows named are the rows of the batch"


def test_a_diverging_loss_stops(tmp_path: Path) -> None:
    watch = Watch("cpt", tmp_path / "metrics.jsonl", View(Console(quiet=True)))
    watch.stop = StageError
    for loss in [3.0, 2.0, 1.0, 0.9, 5.0, 0.8, 0.7]:
        watch._check_divergence(loss)  # one bad step is forgiven
    for loss in [4.0, 4.0]:
        watch._check_divergence(loss)
    with pytest.raises(StageError, match="diverges"):
        watch._check_divergence(9.0)


def test_a_full_disk_stops_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(tmp_path, "stages.cpt.save_every=2")
    usage = namedtuple("usage", "total used free")
    real = shutil.disk_usage

    def nearly_full(path: Path) -> Any:
        return real(path) if trainer.state.global_step < 4 else usage(100, 100, 20_000)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    with pytest.raises(DiskFull, match=r"step 4.*checkpoint-2"):
        trainer.train()
    folder = tmp_path / "checkpoints" / "cpt"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert damaged_file(folder / "checkpoint-2") is None
    assert not (tmp_path / "checkpoints" / "cpt.part").exists()


def test_a_write_that_fails_midway_leaves_the_last_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(tmp_path, "stages.cpt.save_every=2")
    real = torch.save

    def failing(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        real(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    folder = tmp_path / "checkpoints" / "cpt"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert damaged_file(folder / "checkpoint-2") is None


def test_a_changed_learning_rate_is_used_when_a_stage_goes_on(tmp_path: Path) -> None:
    first = _trainer(tmp_path, "stages.cpt.save_every=2", "stages.cpt.warmup_steps=0")
    first.args.max_steps = 2
    first.train()
    second = _trainer(tmp_path, "stages.cpt.learning_rate=1e-5", "stages.cpt.warmup_steps=0")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "cpt" / "checkpoint-2"))
    rates = [
        row["learning_rate"] for row in second.state.log_history if row.get("step", 0) > 3 and "learning_rate" in row
    ]
    assert rates
    assert max(rates) <= 1e-5


def test_long_texts_lose_no_token() -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerRecipe(vocab_size=400), 128)
    rows = text_rows(RECORDS, tokenizer, 7)
    assert max(len(row["input_ids"]) for row in rows) == 7
    whole = [token for text in TEXTS for token in tokenizer(f"{text}<|im_end|>")["input_ids"]]
    assert [token for row in rows for token in row["input_ids"]] == whole


def test_packs_hold_every_token_and_do_not_look_across_documents(tmp_path: Path) -> None:
    """The loss of a packed batch is the loss of its documents one by one."""
    trainer = _trainer(tmp_path, "stages.cpt.packing=true", "stages.cpt.max_length=64", "stages.cpt.batch_size=2")
    tokenizer: Any = trainer.processing_class
    packed = sorted(token for row in trainer.train_dataset["input_ids"] for token in row)
    assert packed == sorted(token for text in TEXTS for token in tokenizer(f"{text}<|im_end|>")["input_ids"])
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 4, "several documents share a pack"
    model: Any = trainer.model.eval()  # type: ignore[union-attr]
    with torch.no_grad():
        together = trainer.compute_loss(model, batch)
        total, count = 0.0, 0
        ids = batch["input_ids"][0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            document = ids[None, start:end]
            output = model(input_ids=document, labels=document)
            total += output.loss.item() * (end - start - 1)
            count += end - start - 1
    assert together.item() == pytest.approx(total / count, abs=1e-5)


def test_the_private_places_of_transformers_and_trl_that_the_loop_overrides() -> None:
    assert "run_dir = self._get_output_dir(trial=trial)" in inspect.getsource(Trainer._save_checkpoint)
    assert list(inspect.signature(Trainer._save_checkpoint).parameters) == ["self", "model", "trial"]
    assert list(inspect.signature(Trainer._clip_grad_norm).parameters) == ["self", "model"]
    assert list(inspect.signature(Trainer._get_train_sampler).parameters) == ["self", "train_dataset"]
    assert list(inspect.signature(Trainer._load_optimizer_and_scheduler).parameters) == ["self", "checkpoint"]
    assert "self.create_model_card" in inspect.getsource(SFTTrainer._save_checkpoint)


def test_dialogues_cut_before_their_answer_are_left_out(tmp_path: Path) -> None:
    """Alone in a batch such a row would have no scored token, and the mean over none is not a number."""
    recipe = _recipe("stages.sft.max_length=60", "stages.sft.batch_size=1", "stages.sft.gradient_accumulation=1")
    tokenizer = train_tokenizer(TEXTS, TokenizerRecipe(vocab_size=400), 128)
    records = [_dialogue(number, "问" * (number % 2 * 80 + 1)) for number in range(6)]
    model = new_model(recipe, tokenizer)
    trainer = sft_trainer(model, tokenizer, recipe, records, records, tmp_path / "sft")
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (3, 3)  # type: ignore[arg-type]
    assert "3 of 6 records are cut before their answer and left out" in trainer.notes
    trainer.train()
    with pytest.raises(StageError, match="none has a token to learn from"):
        sft_trainer(model, tokenizer, recipe, [records[1]], [], tmp_path / "sft")


def _history(*losses: float) -> TrainerState:
    return TrainerState(log_history=[{"eval_loss": loss} for loss in losses])


def test_patience_counts_evaluations_without_a_better_loss() -> None:
    stop = EarlyStop(2)
    assert not stop.exhausted(_history())
    assert not stop.exhausted(_history(3.0, 2.0, 2.5))
    assert stop.exhausted(_history(3.0, 2.0, 2.5, 2.0)), "as good is not better"
    assert not stop.exhausted(_history(3.0, 2.0, 2.5, 1.9))


def _fit(trainer: TextTrainer, folder: Path) -> tuple[dict[str, Any], bool]:
    return fit(trainer, "cpt", folder / "metrics.jsonl", View(Console(quiet=True)), gpu=False)


def test_a_stage_killed_after_its_last_step_goes_no_step_further(tmp_path: Path) -> None:
    """In the middle of an epoch the trainer would make one more step before it sees that it is done."""
    changes = ("stages.cpt.save_every=2", "stages.cpt.max_steps=4", "stages.cpt.log_every=3")
    first = _trainer(tmp_path, *changes)
    result, interrupted = _fit(first, tmp_path)
    assert not interrupted
    second = _trainer(tmp_path, *changes)
    again, _ = _fit(second, tmp_path)
    assert again["steps"] == result["steps"] == 4
    assert again["tokens"] == result["tokens"] > 0, "the last step is logged, whatever log_every says"
    assert again["loss"] == result["loss"]
    for name, weight in first.model.state_dict().items():  # type: ignore[union-attr]
        assert weight.equal(second.model.state_dict()[name])  # type: ignore[union-attr]


def test_a_signal_in_the_last_step_is_not_lost(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "stages.cpt.max_steps=2")

    class Late(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    trainer.add_callback(Late())
    result, interrupted = _fit(trainer, tmp_path)
    assert (result["steps"], interrupted) == (2, True)


def test_the_best_weights_are_handed_on_also_after_the_folder_was_moved(tmp_path: Path) -> None:
    changes = (
        "stages.cpt.save_every=2",
        "stages.cpt.evaluate_every=2",
        "stages.cpt.keep=best",
        "stages.cpt.max_steps=4",
    )
    first = _trainer(tmp_path / "here", *changes, held_out=RECORDS[:4])
    first.evaluate = lambda *a, **k: {"eval_loss": float(first.state.global_step)}  # type: ignore[method-assign]
    first.train()
    (tmp_path / "here").rename(tmp_path / "there")
    second = _trainer(tmp_path / "there", *changes, held_out=RECORDS[:4])
    result, _ = _fit(second, tmp_path)
    assert result["best_step"] == 2
    best = load_file(tmp_path / "there" / "checkpoints" / "cpt" / "checkpoint-2" / "model.safetensors")
    weights = second.model.state_dict()  # type: ignore[union-attr]
    for name, weight in best.items():
        assert weights[name].equal(weight)
    damaged = tmp_path / "there" / "checkpoints" / "cpt" / "checkpoint-2" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(StageError, match="keep=last"):
        _fit(_trainer(tmp_path / "there", *changes, held_out=RECORDS[:4]), tmp_path)
