"""The run folder: what is known of a run (`run.json`) and where its parts stand."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from trainer import prompts
from trainer.corpus.build import data_sha256
from trainer.corpus.record import read_records
from trainer.recipe import PROJECT, STAGES, Recipe
from trainer.stages.checkpoints import flush, forget_after

FOLDERS = {stage: f"{number}-{stage}" for number, stage in enumerate(STAGES, 1)}
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers")
_DIALOGUES = 256  # of calibration.jsonl and held_out.jsonl, at most
# Settings that change nothing in what was trained so far; stages that are not done may change as a whole.
_FREE = {"loggers", "device", "attention"}
# Settings of a stage that has begun that leave its place among the rows, its weights and its optimiser as they are.
_KEEPS_PLACE = {
    "learning_rate",
    "warmup_steps",
    "activation_checkpointing",
    "log_every",
    "save_every",
    "evaluate_every",
    "patience",
    "keep",
}


class RunError(ValueError):
    """A run folder that cannot be continued; the message names the cause and the remedy."""


class RunFolder:
    """Paths and record of one run. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = {}

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def base(self) -> Path:
        """A converted base, for recipes that need one."""
        return self.path / "0-base"

    def stage(self, name: str) -> Path:
        """What a stage hands on."""
        return self.path / FOLDERS[name]

    def checkpoints(self, name: str) -> Path:
        """Where a stage keeps its checkpoints while it runs."""
        return self.path / "checkpoints" / name

    def done(self, name: str) -> bool:
        """Whether a stage has ended."""
        return name in self.record["stages"]

    @contextmanager
    def lock(self, main: bool) -> Iterator[None]:
        """Keeps a second `train` out of the folder. Raises RunError when one is at work, or nothing can be written."""
        if not main:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise RunError(
                f"Another `pediatricsgpt train` is at work in {self.path}. Wait for it or stop it."
            ) from None
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}). Give another --output.") from None
        with lock:
            yield

    def check_base(self, recipe: Recipe) -> None:
        """Raises RunError when the base was replaced before the first stage was done with it."""
        known = self.record.get("base_sha256")
        if known and not self.done(STAGES[0]) and digests(Path(recipe.base or "")) != known:
            raise RunError(f"The base {recipe.base} is not the one that this run began with. Give another --output.")

    def tidy(self) -> None:
        """Removes the checkpoints of stages that are done: a kill may have come before that."""
        for name in self.record["stages"]:
            shutil.rmtree(self.checkpoints(name), ignore_errors=True)

    def check_stage(self, name: str) -> None:
        """Raises RunError when a finished stage's files are not as it left them."""
        for file, digest in self.record["stages"][name]["files"].items():
            path = self.stage(name) / file
            if not path.is_file() or _sha256(path) != digest:
                raise RunError(
                    f"{path} is not as its stage left it, so nothing can start from it. Put it back from a copy, or "
                    "train again with another --output."
                )

    def read(self) -> bool:
        """Reads run.json; False when there is none yet. Raises RunError when it cannot be read."""
        file = self.path / "run.json"
        if not file.exists():
            return False
        try:
            self.record = json.loads(file.read_text(encoding="utf-8"))
            if missing := {"recipe", "stages", "held_out", "corpus_sha256"} - set(self.record):
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except (ValueError, OSError, TypeError) as error:
            raise RunError(f"{file} cannot be used ({error}). Give another --output or remove the folder.") from None
        return True

    def write(self) -> None:
        """Writes run.json aside and renames it."""
        part = self.path / "run.json.part"
        part.write_text(json.dumps(self.record, ensure_ascii=False, indent=1), encoding="utf-8")
        flush(part)
        part.replace(self.path / "run.json")

    def check_corpus(self, corpus: Path) -> None:
        """Raises RunError when the run began on other records."""
        if self.record["corpus_sha256"] != data_sha256(corpus):
            raise RunError(
                f"{self.path} was made with another corpus (its cards, records or phrasings have changed since). "
                "Give another --output or remove the folder."
            )

    def check_recipe(self, recipe: Recipe, accept_changes: bool, console: Console) -> None:
        """Holds the record against the recipe of this call. Raises RunError when they differ.

        `accept_changes` lets settings differ that only concern what is still to come, and records them.
        """
        now = described(recipe)
        changes = dict(_differences(self.record["recipe"], now))
        if not changes:
            return
        listed = "; ".join(f"{key}: {before} → {after}" for key, (before, after) in changes.items())
        done = set(self.record["stages"])
        fixed = [key for key in changes if not _may_change(key, done)]
        if fixed or not accept_changes:
            remedy = "Give another --output or remove the folder."
            if not fixed:
                remedy = f"--accept-changes continues it with the new settings; else {remedy[0].lower()}{remedy[1:]}"
            raise RunError(f"{self.path} was made with another recipe ({listed}). {remedy}")
        console.print(f"Accepted: {listed}", soft_wrap=True)
        for stage in sorted({key.split(".")[1] for key in changes if _restarts(key)}):
            if self.checkpoints(stage).exists():
                console.print(f"{stage} starts again: its checkpoints do not fit the new settings")
                shutil.rmtree(self.checkpoints(stage))
                forget_after(self.metrics, stage, -1)
        self.record.setdefault("changes", []).append({"when": _now(), **{k: list(v) for k, v in changes.items()}})
        self.record["recipe"] = now
        self.write()

    def create(self, recipe: Recipe, corpus: Path, processes: int) -> None:
        """Describes a new run in its folder."""
        self.record = {
            "name": recipe.name,
            "created": _now(),
            "recipe": described(recipe),
            "corpus_sha256": data_sha256(corpus),
            "base_sha256": digests(Path(recipe.base)) if recipe.base and Path(recipe.base).is_dir() else None,
            "seed": recipe.seed,
            "versions": {package: version(package) for package in _PACKAGES},
            "git_commit": _git_commit(),
            "hardware": {
                "cpus": os.cpu_count(),
                "gpus": torch.cuda.device_count(),
                "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "threads": torch.get_num_threads(),
                "processes": processes,
            },
            "held_out": {},
            "stages": {},
        }
        shutil.copyfile(prompts.PROMPTS_FILE, self.path / "prompts.json")
        self._copy_dialogues(corpus / "mue.jsonl", "calibration.jsonl", recipe.seed)
        if (corpus / "held_out_questions.jsonl").exists():
            self._copy_dialogues(corpus / "held_out_questions.jsonl", "held_out.jsonl", recipe.seed)
        self.write()

    def _copy_dialogues(self, source: Path, name: str, seed: int) -> None:
        """Dialogues of the three tasks for quantize: it merges the experts on some and measures the loss on others."""
        records = [r for r in read_records(source) if r.task in prompts.prompts()["task_prompts"]]
        chosen = random.Random(seed).sample(records, min(_DIALOGUES, len(records)))
        with (self.path / name).open("w", encoding="utf-8") as file:
            for record in chosen:
                row = {"task": record.task, "messages": [m.model_dump() for m in record.messages or ()]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def described(recipe: Recipe) -> dict[str, Any]:
    """The recipe as run.json holds it: without the place of the corpus, whose content is known by its digest."""
    return recipe.model_dump(mode="json", exclude={"corpus": {"cards", "records"}})


def digests(folder: Path) -> dict[str, str]:
    """sha256 of a folder's files by name."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _restarts(key: str) -> bool:
    """Whether a stage that has begun must begin again: its rows, weights or optimiser would be others."""
    top, *rest = key.split(".")
    return top == "stages" and rest[1] not in _KEEPS_PLACE


def _may_change(key: str, done: set[str]) -> bool:
    top, *rest = key.split(".")
    return top in _FREE or (top == "stages" and rest[0] not in done)


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Dotted keys whose values differ."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif before != now:
        yield key, (before, now)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package, or no git on this machine
    return result.stdout.strip()
