"""A run: the four stages of one recipe, each starting where the one before it ended, resumable at every step."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)
from transformers import logging as transformers_logging

from trainer import prompts
from trainer.corpus.build import build_corpus, data_sha256, is_current
from trainer.corpus.record import Record, read_records
from trainer.induction import write_induction_heads
from trainer.mue import MueConfig
from trainer.recipe import PROJECT, Recipe
from trainer.report import plot_losses
from trainer.stages.common import Watch, fit, progress_bars
from trainer.stages.cpt import cpt_trainer
from trainer.stages.dfpo import dfpo_trainer
from trainer.stages.sft import sft_trainer
from trainer.tokenizer import token_id, train_tokenizer

STAGES = {"cpt": "1-cpt", "sft": "2-sft", "dfpo": "3-dfpo", "mue": "4-mue"}
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers")
_CALIBRATION_DIALOGUES = 64


class RunError(ValueError):
    """A run folder that cannot be continued; the message names the cause and the remedy."""


class Run:
    """The folder of one run and what is known of it (`run.json`)."""

    def __init__(self, recipe: Recipe, folder: Path, corpus: Path, console: Console) -> None:
        self.recipe = recipe
        self.folder = folder
        self.corpus = corpus
        self.console = console
        self.record: dict[str, Any] = {}

    def execute(self) -> None:
        """Builds the corpus if need be and runs every stage that is not done yet.

        Raises Interrupted after Ctrl-C, RunError when the folder belongs to another recipe.
        """
        _quieten_libraries()
        self._open()
        tokenizer = self._tokenizer()
        previous: Path | None = None
        with progress_bars(self.console) as progress:
            for stage, name in STAGES.items():
                target = self.folder / name
                if stage not in self.record["stages"]:
                    set_seed(self.recipe.seed)
                    watch = Watch(stage, self.folder / "metrics.jsonl", progress)
                    self.console.print(f"[bold]{stage.upper()}[/] starts from {previous or 'random weights'}")
                    try:
                        self.record["stages"][stage] = self._stage(stage, previous, target, tokenizer, watch)
                    except (RuntimeError, SafetensorError) as error:
                        raise self._disk_error(error) from error
                    self._write_record()
                    shutil.rmtree(self._checkpoints(stage), ignore_errors=True)
                previous = target
        plot_losses(self.folder)

    def _open(self) -> None:
        file = self.folder / "run.json"
        recipe = self.recipe.model_dump(mode="json", exclude={"corpus": {"cards"}})
        if file.exists():
            try:
                self.record = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, OSError) as error:
                raise RunError(
                    f"{file} cannot be read ({error}). Give another --output or remove the folder."
                ) from None
            if self.record["recipe"] != recipe:
                raise RunError(
                    f"{self.folder} was made with another recipe. Give another --output or remove the folder."
                )
        if not is_current(self.corpus, self.recipe):
            self.console.print(f"Building the corpus {self.corpus} …")
            build_corpus(self.recipe, self.corpus)
        corpus_sha256 = data_sha256(self.corpus)
        if self.record:
            if self.record["corpus_sha256"] != corpus_sha256:
                raise RunError(
                    f"{self.folder} was made with another corpus (its cards or phrasings have changed since). "
                    "Give another --output or remove the folder."
                )
            done = ", ".join(self.record["stages"]) or "none"
            self.console.print(f"Continuing {self.folder} (stages done: {done})")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_disk()
        self.record = {
            "name": self.recipe.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": recipe,
            "corpus_sha256": corpus_sha256,
            "seed": self.recipe.seed,
            "versions": {package: version(package) for package in _PACKAGES},
            "git_commit": _git_commit(),
            "hardware": {
                "cpus": os.cpu_count(),
                "gpus": torch.cuda.device_count(),
                "threads": torch.get_num_threads(),
            },
            "stages": {},
        }
        shutil.copyfile(prompts.PROMPTS_FILE, self.folder / "prompts.json")
        self._write_calibration()
        self._write_record()

    def _check_disk(self) -> None:
        """Refuses to start a run that cannot be saved: three models, two checkpoints with optimiser state (fp32)."""
        shape = self.recipe.model
        attention = shape.hidden_size * shape.head_dim * (2 * shape.heads + 2 * shape.key_value_heads)
        layer = attention + 3 * shape.hidden_size * shape.intermediate_size
        parameters = self.recipe.tokenizer.vocab_size * shape.hidden_size + shape.layers * layer
        needed, free = parameters * 4 * (3 + 2 * 3), shutil.disk_usage(self.folder).free
        if free < needed:
            raise RunError(
                f"{self.folder} needs about {needed / 1e6:.0f} MB for its checkpoints, "
                f"but {free / 1e6:.0f} MB are free. Make room or give an --output on another disk."
            )

    def _write_record(self) -> None:
        part = self.folder / "run.json.part"
        part.write_text(json.dumps(self.record, ensure_ascii=False, indent=1), encoding="utf-8")
        part.replace(self.folder / "run.json")

    def _write_calibration(self) -> None:
        """Dialogues of the training split on which quantize measures gates and losses."""
        records = [r for r in self._records("mue") if r.task in prompts.prompts()["task_prompts"]]
        chosen = random.Random(self.recipe.seed).sample(records, min(_CALIBRATION_DIALOGUES, len(records)))
        with (self.folder / "calibration.jsonl").open("w", encoding="utf-8") as file:
            for record in chosen:
                row = {"task": record.task, "messages": [m.model_dump() for m in record.messages or ()]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _records(self, name: str) -> list[Record]:
        return list(read_records(self.corpus / f"{name}.jsonl"))

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.folder / "tokenizer"
        if not folder.exists():
            texts = [r.text or "" for r in self._records("cpt")]
            texts += [m.content for r in self._records("sft") for m in r.messages or ()]
            trained = train_tokenizer(texts, self.recipe.tokenizer, self.recipe.model.context)
            part = folder.with_name("tokenizer.part")
            trained.save_pretrained(part)
            part.rename(folder)
        return AutoTokenizer.from_pretrained(folder)

    def _stage(
        self,
        stage: str,
        previous: Path | None,
        target: Path,
        tokenizer: PreTrainedTokenizerFast,
        watch: Watch,
    ) -> dict[str, Any]:
        checkpoints = self._checkpoints(stage)
        recipe, stages = self.recipe, self.recipe.stages
        model = _load(previous) if previous else new_model(recipe, tokenizer)
        make: dict[str, Callable[[], Any]] = {
            "cpt": lambda: cpt_trainer(model, tokenizer, recipe, self._records("cpt"), checkpoints),
            "sft": lambda: sft_trainer(model, tokenizer, recipe, stages.sft, self._records("sft"), checkpoints),
            "dfpo": lambda: dfpo_trainer(model, tokenizer, recipe, self._records("preferences"), checkpoints),
            "mue": lambda: sft_trainer(
                model, tokenizer, recipe, stages.mue, self._records("mue"), checkpoints, _mue_config(recipe)
            ),
        }
        trainer = make[stage]()
        result = fit(trainer, watch, checkpoints)
        self._save(trainer.model, tokenizer, target)
        return result

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def _disk_error(self, error: Exception) -> Exception:
        """torch and safetensors report a full disk as errors of their own kinds; anything else stays what it is."""
        if shutil.disk_usage(self.folder).free > 1_000_000 and "space" not in str(error):
            return error
        return RunError(f"The disk of {self.folder} is full. Make room; the same command continues.")

    def _save(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(str(part))
        if not isinstance(model, PeftModel):
            tokenizer.save_pretrained(part)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3-architecture model with random weights."""
    shape = recipe.model
    set_seed(recipe.seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate_size,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.context,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=token_id(tokenizer, "<|im_end|>"),
            pad_token_id=token_id(tokenizer, "<|endoftext|>"),
        )
    )
    if shape.induction_heads:
        write_induction_heads(model, recipe.seed)
    return model


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _mue_config(recipe: Recipe) -> MueConfig:
    stage = recipe.stages.mue
    return MueConfig(r=stage.r, alpha=stage.alpha, num_specific=stage.num_specific, task_type="CAUSAL_LM")


def _quieten_libraries() -> None:
    """Our progress bar replaces theirs, and their deprecation notes are ours to act on, not the user's."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _git_commit() -> str | None:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git on this machine
    return result.stdout.strip()
