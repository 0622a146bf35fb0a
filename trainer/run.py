"""A run: the four stages of one recipe, each starting where the one before it ended, resumable at every step."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, release_memory
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerFast, set_seed
from transformers import logging as transformers_logging
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import trainer.mue  # noqa: F401  (registers the adapter type with PEFT)
from trainer.bases.baichuan import convert_baichuan, is_baichuan
from trainer.corpus.build import build_corpus, check_records, is_current
from trainer.corpus.record import read_records
from trainer.evaluate.held_out import load_held_out, measure
from trainer.folder import RunError, RunFolder, digests
from trainer.origin import load_model, make_tokenizer, on_gpu, start_model
from trainer.recipe import STAGES, DenseStage, Recipe, RecipeError
from trainer.report import write_report
from trainer.stages.adapters import merge_lora
from trainer.stages.build import stage_records, stage_trainer
from trainer.stages.fit import fit
from trainer.stages.observers import LookAtEvaluation, Observer
from trainer.stages.template import check_template
from trainer.stages.view import View

_PATIENCE = timedelta(hours=2)  # the other processes wait while the main one builds a corpus or converts a base
_SENTENCEPIECE = "tokenizer.model"  # its scores are what a GGUF file of such a vocabulary needs
_NO_SPACE = "No space left"
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUDA error: out of memory")


class Run:
    """Executes a recipe in a folder; the same call continues it."""

    def __init__(self, recipe: Recipe, folder: Path, corpus: Path, console: Console) -> None:
        _check_extras(recipe)
        _check_launcher()
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
        another recipe, CorpusError and RecipeError for bad input.
        """
        _quieten_libraries()
        if self.processes.is_main_process:
            self._open(accept_changes)
        self.processes.wait_for_everyone()
        self.folder.read()
        tokenizer = AutoTokenizer.from_pretrained(self.folder.tokenizer, local_files_only=True)
        check_template(tokenizer)
        self._measure("start", tokenizer)
        previous: Path | None = None
        with View(self.console) as view:
            for name in STAGES:
                try:
                    if not self.folder.done(name):
                        self._stage(name, previous, tokenizer, view)
                    self._measure(name, tokenizer)
                except (RuntimeError, OSError, SafetensorError) as error:
                    raise self._explained(error, name) from error
                previous = self.folder.stage(name)

    def _open(self, accept_changes: bool) -> None:
        """Corpus, folder and tokenizer, made by the main process."""
        known = self.folder.read()
        if known:  # before the corpus is touched: another recipe would build another one in its place
            self.folder.check_recipe(self.recipe, accept_changes, self.console)
        if self.recipe.corpus.records:
            check_records(self.corpus)
        elif not is_current(self.corpus, self.recipe):
            self.console.print(f"Building the corpus {self.corpus} …")
            build_corpus(self.recipe, self.corpus)
        if known:
            self.folder.check_corpus(self.corpus)
            done = ", ".join(self.folder.record["stages"]) or "none"
            self.console.print(f"Continuing {self.folder.path} (stages done: {done})", soft_wrap=True)
        else:
            self.folder.create(self.recipe, self.corpus, self.processes.num_processes)
        self._convert_base()
        if not self.folder.tokenizer.exists():
            texts = [r.text or "" for r in stage_records("cpt", self.corpus)]
            texts += [m.content for r in stage_records("sft", self.corpus) for m in r.messages or ()]
            part = self.folder.tokenizer.with_name("tokenizer.part")
            make_tokenizer(self._based(), texts).save_pretrained(part)
            vocabulary = self.folder.path / "0-base" / _SENTENCEPIECE
            if vocabulary.exists():
                shutil.copyfile(vocabulary, part / _SENTENCEPIECE)
            part.rename(self.folder.tokenizer)

    def _convert_base(self) -> None:
        """Baichuan's own code cannot run in this transformers; its 7B models have an exact Llama form."""
        source = Path(self.recipe.base or "")
        target = self.folder.path / "0-base"
        if self.recipe.base and is_baichuan(source) and not target.exists():
            with self.console.status(f"converting {source} to the Llama form"):
                convert_baichuan(source, target)

    def _based(self) -> Recipe:
        """The recipe with the converted base, if there was one to convert."""
        converted = self.folder.path / "0-base"
        return self.recipe.model_copy(update={"base": str(converted)}) if converted.exists() else self.recipe

    def _stage(self, name: str, previous: Path | None, tokenizer: PreTrainedTokenizerFast, view: View) -> None:
        recipe, stage = self._based(), self.recipe.stage(name)
        set_seed(recipe.seed)
        origin = previous or recipe.base or "random weights"
        self.console.print(f"[bold]{name.upper()}[/] starts from {origin}", highlight=False)
        self._print_inheritance(name)
        model = load_model(previous, recipe, tokenizer, stage) if previous else start_model(recipe, tokenizer, stage)
        checkpoints = self.folder.checkpoints(name)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.folder.path / "tensorboard" / name)
        trainer = stage_trainer(name, model, tokenizer, recipe, self.corpus, checkpoints)
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.add_callback(LookAtEvaluation(self._observer(tokenizer), name))
        # Weights must start alike on all processes; what they draw from here on, the routers' noise, must not be alike.
        torch.manual_seed(recipe.seed + self.processes.process_index)
        result = fit(trainer, name, self.folder.metrics, view, on_gpu(recipe))
        self._hand_on(trainer, name, previous or recipe.base, tokenizer)
        trainer.accelerator.free_memory()
        del trainer, model
        release_memory()
        if self.processes.is_main_process:
            self.folder.record["stages"][name] = {**result, "files": digests(self.folder.stage(name))}
            self.folder.write()
            shutil.rmtree(checkpoints, ignore_errors=True)

    def _print_inheritance(self, name: str) -> None:
        inherited, overridden = self.recipe.inheritance(name)
        if overridden:
            changed = ", ".join(f"{key} {before} → {now}" for key, (before, now) in overridden.items())
            self.console.print(f"  sets       {changed}", style="dim", highlight=False, soft_wrap=True)
        if inherited:
            fields = type(self.recipe.stage(name)).model_fields
            same = ", ".join(f"{key} {value}" for key, value in inherited.items() if value != fields[key].default)
            self.console.print(f"  inherits   {same}", style="dim", highlight=False, soft_wrap=True)

    def _hand_on(self, trainer: Any, name: str, origin: Path | str | None, tokenizer: PreTrainedTokenizerFast) -> None:
        """Writes the stage's folder aside and renames it; a LoRA is merged into what the stage started from."""
        target = self.folder.stage(name)
        part = target.with_name(f"{target.name}.part")
        if self.processes.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.processes.wait_for_everyone()
        trainer.save_model(str(part))  # every process: sharded weights are gathered
        unset_hf_deepspeed_config()  # or what is loaded from here on would be sharded for an engine that has ended
        if self.processes.is_main_process:
            stage = self.recipe.stage(name)
            if isinstance(stage, DenseStage) and stage.method == "lora":
                assert origin is not None
                adapter = part.with_name(f"{target.name}-lora.part")
                shutil.rmtree(adapter, ignore_errors=True)
                part.rename(adapter)
                merge_lora(origin, adapter, part)
                shutil.rmtree(adapter)
            if name != "mue":
                shutil.copytree(self.folder.tokenizer, part, dirs_exist_ok=True)
            for extra in ("training_args.bin", "README.md"):
                (part / extra).unlink(missing_ok=True)
            if name == "mue":
                for file in part.glob("*token*"):
                    file.unlink()
                (part / "chat_template.jinja").unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        self.processes.wait_for_everyone()

    def _measure(self, when: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """Held-out figures of what stands in the folder (at `start`: of the base or the random weights)."""
        if when in self.folder.record["held_out"]:
            return
        recipe = self._based()
        model: Any
        if when == "start":
            model = start_model(recipe, tokenizer)
        elif when == "mue":
            model = PeftModel.from_pretrained(
                load_model(self.folder.stage("dfpo"), recipe, tokenizer), str(self.folder.stage("mue"))
            )
        else:
            model = load_model(self.folder.stage(when), recipe, tokenizer)
        model = model.to(self.processes.device)
        length = self.recipe.stage("sft" if when in ("start", "cpt") else when).max_length
        state = self.processes
        with self.console.status(f"measuring held-out losses ({when})"):
            self.folder.record["held_out"][when] = measure(
                model,
                tokenizer,
                load_held_out(self.corpus),
                length,
                rank=state.process_index,
                world=state.num_processes,
                bf16=recipe.bf16,
            )
        if state.is_main_process:
            if when in STAGES:
                self._observer(tokenizer).look(model, when, self.folder.record["stages"][when]["steps"])
            self.folder.write()
            if when in STAGES:
                write_report(self.folder.path)
        state.wait_for_everyone()

    def _observer(self, tokenizer: PreTrainedTokenizerFast) -> Observer:
        questions = self.corpus / "held_out_questions.jsonl"
        return Observer(self.folder.path, tokenizer, list(read_records(questions)) if questions.exists() else [])

    def _explained(self, error: Exception, name: str) -> Exception:
        """torch, safetensors and CUDA report a full disk or memory as errors of their own kinds."""
        text = str(error)
        full = shutil.disk_usage(self.folder.path).free < 1_000_000 or _NO_SPACE in text
        if full or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            return RunError(f"The disk of {self.folder.path} is full. Make room; the same command continues.")
        if isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
            return RunError(self._memory_advice(name))
        return error

    def _memory_advice(self, name: str) -> str:
        stage = self.recipe.stage(name)
        steps = []
        if stage.batch_size > 1:
            steps.append(
                f"stages.{name}.batch_size={stage.batch_size // 2} "
                f"stages.{name}.gradient_accumulation={stage.gradient_accumulation * 2} (same steps, less at a time)"
            )
        if not stage.activation_checkpointing:
            steps.append(f"stages.{name}.activation_checkpointing=true (about a third slower)")
        if isinstance(stage, DenseStage) and stage.method == "full":
            steps.append(f"stages.{name}.optimizer=adamw_8bit, or stages.{name}.method=lora")
        elif not stage.load_in_4bit:
            steps.append(f"stages.{name}.load_in_4bit=true")
        steps.append(f"stages.{name}.max_length={stage.max_length // 2} (truncates more: see `pediatricsgpt plan`)")
        return (
            f"{name.upper()} does not fit into memory. In this order, one at a time, with --accept-changes:\n  "
            + "\n  ".join(steps)
        )


def _check_extras(recipe: Recipe) -> None:
    """Packages that only some recipes need. Raises RecipeError."""
    quantized = any(recipe.stage(name).load_in_4bit or "8bit" in recipe.stage(name).optimizer for name in STAGES)
    wanted = {**dict.fromkeys(recipe.loggers, "loggers"), **({"bitsandbytes": "qlora"} if quantized else {})}
    for package, extra in wanted.items():
        if find_spec(package) is None:
            raise RecipeError(
                f"The recipe uses {package}, which is not installed. Add it with: pip install 'pediatricsgpt[{extra}]'."
            )


def _check_launcher() -> None:
    """What a launcher's configuration can set and a run cannot use. Raises RecipeError."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        # It repeats a layer with other random numbers, so the routers' noise would get gradients of another noise.
        raise RecipeError(
            "FSDP's own activation checkpointing does not keep the random state, which MUE's router noise needs. Set "
            "fsdp_activation_checkpointing: false in the launcher's file, and activation_checkpointing=true for the "
            "stages of the recipe that need it."
        )


def _quieten_libraries() -> None:
    """Our progress bar replaces theirs, and their deprecation notes are ours to act on, not the user's."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
