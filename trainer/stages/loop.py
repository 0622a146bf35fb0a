"""What our stages add to TRL's trainers: order of rows, checkpoints that are whole or absent, a stop on bad numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Trainer

from trainer.recipe import PackedStage, StageRecipe
from trainer.stages.checkpoints import damaged_file, forget_old, newest_sound, seal, step_of
from trainer.stages.copying import IGNORED
from trainer.stages.sampling import EpochSampler

# For the type checker the mixin is a Trainer; at run time TRL's trainer stands behind it.
_Base = Trainer if TYPE_CHECKING else object
_ADAM_BYTES = 8  # two float32 moments per trained parameter


class StageError(ValueError):
    """A stage that cannot go on; the message names the cause, the batch and the remedy."""


class DiskFull(StageError):
    """There is no room for the next checkpoint."""


def elements(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter, also of one packed in 4 bits or partitioned by ZeRO-3."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def _lengths(rows: Any) -> list[int]:
    """Tokens of each row; of a pair's, the prompt with the longer answer."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    columns = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in zip(*columns, strict=True)]


def _notes(records: int, lengths: list[int], stage: StageRecipe) -> tuple[str, ...]:
    """What max_length takes from the records."""
    notes = ()
    if len(lengths) < records:
        notes += (f"{records - len(lengths)} of {records} records are cut before their answer and left out",)
    if full := sum(length >= stage.max_length for length in lengths):
        notes += (f"{full} of {records} records fill max_length and may be cut; `plan` counts the tokens",)
    return notes


def _scored(packs: Any) -> Any:
    """Packs with at least one scored token: a batch of cut dialogues only would have no loss. (TRL leaves out rows
    without one, but cuts packs later.)"""
    kept = [number for number, labels in enumerate(packs["labels"]) if any(label != IGNORED for label in labels)]
    return packs if len(kept) == len(packs) else packs.select(kept)


class StageLoop(_Base):
    """Put before TRL's trainer in the bases. `row_lengths` groups rows of like length; None shuffles them."""

    row_lengths: list[int] | None = None
    patience = 0
    notes: tuple[str, ...] = ()
    _aside = False

    def configure(self, stage: StageRecipe, records: int, held_out: int, *, cut: bool = True) -> None:
        """Takes the stage's patience, groups rows of like length, and notes what of the records is not used.

        Packs are not grouped: they are all full. `cut`: whether long records are cut at max_length. Raises StageError
        when nothing is left to learn from.
        """
        self.patience = stage.patience
        packed = isinstance(stage, PackedStage) and stage.packing
        if packed:
            self.train_dataset = _scored(self.train_dataset)
        rows: Any = self.train_dataset
        evaluated: Any = self.eval_dataset
        if not len(rows) or (held_out and not len(evaluated)):
            what = f"{records} records" if not len(rows) else f"{held_out} held-out records"
            raise StageError(
                f"{Path(str(self.args.output_dir)).name}: of {what} none has a token to learn from within max_length "
                f"({stage.max_length}): they are cut before their answer. Raise max_length."
            )
        if packed:
            lengths = [length for pack in rows["seq_lengths"] for length in pack]
        else:
            lengths = self.row_lengths = _lengths(rows)
        self.notes = _notes(records, lengths, stage) if cut else ()

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochSampler(len(rows), together, self.args.seed, self.row_lengths)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card into every checkpoint; ours is written once, by quantize, with measured limits."""

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch. Raises StageError when its loss is not a number."""
        self._batch = inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss).all():
            raise self.stop(f"the loss is {loss.item():.4g}")
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        norm: Any = super()._clip_grad_norm(model)
        if norm is not None and not torch.isfinite(torch.as_tensor(norm)).all():
            raise self.stop(f"the gradient's norm is {float(norm):.4g}")
        return norm

    def stop(self, what: str) -> StageError:
        """The error that stops a stage; the micro-batch in hand is written beside the checkpoints as text."""
        step = self.state.global_step + 1
        folder = Path(str(self.args.output_dir))
        tokenizer: Any = self.processing_class
        tensors = {name: value for name, value in self._batch.items() if torch.is_tensor(value) and value.ndim == 2}
        rank = f"-of-process-{self.args.process_index}" if self.args.world_size > 1 else ""
        file = folder / f"batch-{step}{rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = [tokenizer.decode(row) for row in tensors["input_ids"].tolist()]
        file.write_text(json.dumps({"step": step, "texts": texts}, ensure_ascii=False, indent=1), encoding="utf-8")
        last = newest_sound(folder)
        return StageError(
            f"{folder.name}: {what} at step {step} (rows {self._rows_of(step)}; their text is in {file}). "
            + (f"The last good checkpoint is {last}. " if last else "There is no checkpoint yet. ")
            + f"If the text is broken, clean the corpus and start another run; if it is sound, lower learning_rate "
            f"({self.args.learning_rate:g}): `--accept-changes` continues this run with changed settings."
        )

    def _rows_of(self, step: int) -> str:
        """Numbers of the dataset's rows in an optimiser step."""
        sampler = self._get_train_sampler()
        per_epoch = max(1, -(-len(sampler) // sampler.batch))
        sampler.set_epoch((step - 1) // per_epoch)
        start = (step - 1) % per_epoch * sampler.batch
        return ", ".join(map(str, list(sampler)[start : start + sampler.batch]))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return f"{folder}.part" if self._aside else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Writes the checkpoint beside its folder, seals it and renames it: it is there whole or not at all."""
        final = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        part = final.parent.with_name(f"{final.parent.name}.part")
        self._check_room(final.parent)
        self._aside = True
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        finally:
            self._aside = False
        self.accelerator.wait_for_everyone()
        best = self.state.best_global_step
        # Inside super() the path of the best checkpoint was the temporary one; every process loads it in the end.
        self.state.best_model_checkpoint = str(final.with_name(f"checkpoint-{best}")) if best else None
        if self.args.should_save:
            self.state.save_to_json(str(part / final.name / "trainer_state.json"))
            seal(part / final.name)
            final.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(final, ignore_errors=True)
            (part / final.name).rename(final)
            shutil.rmtree(part, ignore_errors=True)
            forget_old(final.parent, best)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What a stage hands on is whole, also where FSDP keeps its checkpoints in shards (transformers writes nothing
        then)."""
        if self.is_fsdp_enabled and not _internal_call:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Weights gathered from shards no longer show that they are tied; one of them is written, as without shards.
        tied = getattr(self.model, "all_tied_weights_keys", {})
        gathered = {name: value for name, value in state_dict.items() if name not in tied} if state_dict else state_dict
        super()._save(output_dir, gathered)

    def take_up(self, checkpoint: Path) -> None:
        """The weights that a stage hands on, when it was killed after its last step."""
        if self.args.load_best_model_at_end:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))

    def _load_best_model(self) -> None:
        """Raises StageError when the best checkpoint is gone or damaged (transformers would go on without it)."""
        best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        damaged = damaged_file(best)
        if damaged:
            raise StageError(
                f"{best} held the best weights and is damaged or gone ({damaged}). Hand on the last ones instead with "
                f"stages.{best.parent.name}.keep=last --accept-changes."
            )
        self.state.best_model_checkpoint = str(best)  # the run folder may have been moved since
        super()._load_best_model()

    def _check_room(self, folder: Path) -> None:
        """Stops while the last checkpoint is still whole. Raises DiskFull."""
        parameters = list(self.model.parameters())  # type: ignore[union-attr]
        trained = sum(elements(p) for p in parameters if p.requires_grad)
        weights = sum(elements(p) * p.element_size() for p in parameters)
        adapter = trained < sum(map(elements, parameters)) / 2
        needed = trained * _ADAM_BYTES + (trained * 4 if adapter else weights)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed * 1.05:
            last = max(folder.glob("checkpoint-*"), key=step_of, default=None)
            raise DiskFull(
                f"The disk of {folder} has {free / 1e9:.2f} GB left and the checkpoint of step "
                f"{self.state.global_step} needs {needed / 1e9:.2f} GB, so nothing was written. Make room; the same "
                f"command continues from {last.name if last else 'the start of the stage'}."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The saved schedule knows the rate it was made with; a run continued with another one must use that.
        scheduler, optimizer = cast(Any, self.lr_scheduler), cast(Any, self.optimizer)
        if checkpoint is not None and hasattr(scheduler, "base_lrs"):
            rate = self.args.learning_rate
            scheduler.base_lrs = [rate for _ in scheduler.base_lrs]
            for group in optimizer.param_groups:
                group["initial_lr"] = rate
