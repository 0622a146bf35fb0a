"""A run: the four stages of one recipe, each starting where the one before it ended, resumable at every step."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast, set_seed

import trainer.mue  # noqa: F401  (registers the adapter type with PEFT)
from trainer.corpus.record import read_records
from trainer.evaluate.held_out import load_held_out, measure
from trainer.failures import explained
from trainer.folder import RunFolder, digests
from trainer.opening import based, check_machine, open_run
from trainer.origin import load_model, load_tokenizer, on_gpu, start_model
from trainer.planning.prepare import quieten_libraries
from trainer.recipe import STAGES, Recipe
from trainer.report import REPORT, write_report
from trainer.stages.build import stage_trainer
from trainer.stages.fit import fit
from trainer.stages.hand_on import hand_on
from trainer.stages.observers import LookAtEvaluation, Observer
from trainer.stages.template import check_template
from trainer.stages.view import View
from trainer.stages.watch import Interrupted

_PATIENCE = timedelta(hours=2)  # the other processes wait while the main one builds a corpus or converts a base


class Run:
    """Executes a recipe in a folder; the same call continues it."""

    def __init__(self, recipe: Recipe, folder: Path, corpus: Path, console: Console) -> None:
        check_machine(recipe)
        self.recipe = recipe
        self.folder = RunFolder(folder)
        self.corpus = recipe.corpus.records or corpus
        # Set by the launcher's file too, but one file decides how a model is trained: the recipe.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe.bf16 else "no"
        self.processes = PartialState(cpu=not on_gpu(recipe), timeout=_PATIENCE)
        console.quiet = not self.processes.is_main_process
        self.console = console

    def execute(self, accept_changes: bool = False) -> None:
        """Builds the corpus if need be and runs every stage that is not done yet.

        Raises Interrupted after Ctrl-C, StageError when a stage cannot go on, RunError when the folder belongs to
        another recipe or the machine fails, CorpusError and RecipeError for bad input.
        """
        quieten_libraries()
        stage: str | None = None
        try:
            with self.folder.lock(self.processes.is_main_process):
                tokenizer = self._open(accept_changes)
                self._measure("start", tokenizer)
                with View(self.console) as view:
                    for name in STAGES:
                        if not self.folder.done(name):
                            stage = name
                            self._stage(name, tokenizer, view)
                        stage = None  # what fails from here on is no setting of the stage
                        self._measure(name, tokenizer)
                self._report()
        except (RuntimeError, OSError, SafetensorError) as error:
            known = explained(error, self.folder.path, stage, self.recipe.stage(stage) if stage else None)
            if known is None:
                raise
            raise known from error

    def _open(self, accept_changes: bool) -> PreTrainedTokenizerFast:
        if self.processes.is_main_process:
            open_run(self.recipe, self.folder, self.corpus, self.processes.num_processes, accept_changes, self.console)
        self.processes.wait_for_everyone()
        self.folder.read()
        tokenizer = load_tokenizer(self.folder.tokenizer)
        check_template(tokenizer)
        return tokenizer

    def _stage(self, name: str, tokenizer: PreTrainedTokenizerFast, view: View) -> None:
        recipe, stage = based(self.recipe, self.folder), self.recipe.stage(name)
        previous = self._previous(name)
        set_seed(recipe.seed)
        origin = previous or recipe.base
        self.console.print(f"[bold]{name.upper()}[/] starts from {origin or 'random weights'}", highlight=False)
        self._print_inheritance(name)
        model = load_model(previous, recipe, tokenizer, stage) if previous else start_model(recipe, tokenizer, stage)
        checkpoints = self.folder.checkpoints(name)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder.path / "tensorboard" / name)
        trainer = stage_trainer(name, model, tokenizer, recipe, self.corpus, checkpoints)
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.add_callback(LookAtEvaluation(self._observer(tokenizer), name))
        # Weights must start alike on all processes; what they draw from here on, the routers' noise, must not be alike.
        torch.manual_seed(recipe.seed + self.processes.process_index)
        result, interrupted = fit(trainer, name, self.folder.metrics, view, on_gpu(recipe))
        hand_on(trainer, stage, origin, self.folder.tokenizer, self.folder.stage(name))
        trainer.accelerator.free_memory()
        del trainer, model
        release_memory()
        if self.processes.is_main_process:
            self.folder.record["stages"][name] = {**result, "files": digests(self.folder.stage(name))}
            self.folder.write()
            shutil.rmtree(checkpoints, ignore_errors=True)
        self.processes.wait_for_everyone()
        self.folder.read()
        if interrupted:  # in the last step: the stage is done, but the run was asked to stop
            raise Interrupted

    def _previous(self, name: str) -> Path | None:
        """What the stage before handed on, whole; None for the first stage."""
        if name == STAGES[0]:
            return None
        before = STAGES[STAGES.index(name) - 1]
        if self.processes.is_main_process:
            self.folder.check_stage(before)
        return self.folder.stage(before)

    def _print_inheritance(self, name: str) -> None:
        inherited, overridden = self.recipe.inheritance(name)
        if overridden:
            changed = ", ".join(f"{key} {before} → {now}" for key, (before, now) in overridden.items())
            self.console.print(f"  sets       {changed}", style="dim", highlight=False, soft_wrap=True)
        if inherited:
            fields = type(self.recipe.stage(name)).model_fields
            same = [f"{key} {value}" for key, value in inherited.items() if value != fields[key].default]
            rest = len(inherited) - len(same)
            listed = ", ".join([*same, *([f"{rest} defaults (report.md lists them)"] if rest else [])])
            self.console.print(f"  inherits   {listed}", style="dim", highlight=False, soft_wrap=True)

    def _measure(self, when: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """Held-out figures of what stands in the folder (at `start`: of the base or the random weights)."""
        if when in self.folder.record["held_out"]:
            return
        recipe = based(self.recipe, self.folder)
        model: Any
        if when == "start":
            model = start_model(recipe, tokenizer)
        elif when == "mue":
            model = load_model(self.folder.stage("dfpo"), recipe, tokenizer)
            model = PeftModel.from_pretrained(model, str(self.folder.stage("mue")))
        else:
            model = load_model(self.folder.stage(when), recipe, tokenizer)
        model = model.to(self.processes.device)
        with self.console.status(f"measuring held-out losses ({when})"):
            self.folder.record["held_out"][when] = measure(
                model,
                tokenizer,
                load_held_out(self.corpus),
                max(self.recipe.stage(name).max_length for name in STAGES),
                rank=self.processes.process_index,
                world=self.processes.num_processes,
                bf16=recipe.bf16,
            )
        if self.processes.is_main_process:
            if when in STAGES:
                self._observer(tokenizer).look(model, when, self.folder.record["stages"][when]["steps"])
            self.folder.write()
            if when in STAGES:
                write_report(self.folder.path)
        self.processes.wait_for_everyone()

    def _observer(self, tokenizer: PreTrainedTokenizerFast) -> Observer:
        questions = self.corpus / "held_out_questions.jsonl"
        records = list(read_records(questions)) if questions.exists() else []
        return Observer(self.folder.path, tokenizer, records, self.recipe.bf16)

    def _report(self) -> None:
        """A kill after the last measurement may have come before its report."""
        report, record = self.folder.path / REPORT, self.folder.path / "run.json"
        if self.processes.is_main_process and not (
            report.exists() and report.stat().st_mtime_ns >= record.stat().st_mtime_ns
        ):
            write_report(self.folder.path)
