"""Useful tokens a second of our SFT stage against TRL's defaults, on one model and the same dialogues.

    python benchmarks/sft_throughput.py [--device cuda] [--threads 1] [--rounds 5] [--ablation] [--json]

Useful tokens are all that are not padding. Both sides start from the same weights and train one epoch over the same
dialogues, none of them truncated, with as many rows in an optimiser step. TRL's side is `SFTTrainer` with an
`SFTConfig()` of which only the number of epochs, what it writes and, on the processor, `use_cpu` are set. Ours is
`stage_trainer`, as `pediatricsgpt train` uses it. Every round times one epoch of all variants one after the other, in
a rotating order; ratios are medians of the rounds' paired ratios, so that other load falls on all alike. With one
thread seconds are those that the processor spent on it, so that other load hardly counts.
`--ablation` changes our settings one at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    TrainerCallback,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trainer import prompts
from trainer.corpus.build import build_corpus, write_corpus
from trainer.corpus.cards import Card, load_cards
from trainer.corpus.phrasing import Phrasing
from trainer.corpus.record import Message, Record, Source, Task
from trainer.origin import load_model, load_tokenizer, make_tokenizer
from trainer.planning.prepare import quieten_libraries
from trainer.recipe import PackedStage, Recipe, load_recipe
from trainer.stages.build import stage_records, stage_trainer, tokenizer_texts

COLUMNS = ("dialogues", "variant", "tokens/s", "× TRL", "range", "seconds", "steps")
TRL, OURS = "TRL's defaults", "ours"
TASKS: tuple[Task, ...] = ("knowledge", "diagnosis", "treatment")
QUESTIONS, PASSAGES = "short questions", "with passages"
WARM_UP = 2  # optimiser steps of each variant before the first round
# The corpus: only dialogues are trained on here, the rest is there for the vocabulary and for `plan`.
CORPUS = (
    "corpus.texts=400", "corpus.selections=0", "corpus.preferences=16", "corpus.held_out=8",
    "tokenizer.vocab_size=4500", "tokenizer.all_characters=true",
)  # fmt: skip
# Qwen3 architectures. Nine million parameters: a round on two slow cores then takes half a minute.
SMALL = {
    "hidden_size": 320, "num_hidden_layers": 6, "intermediate_size": 960, "num_attention_heads": 5,
    "num_key_value_heads": 5, "head_dim": 64,
}  # fmt: skip
QWEN3_06B = {
    "vocab_size": 151_936, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to train: `overrides` of the recipe's SFT stage, rows of like length together or not."""

    name: str
    overrides: tuple[str, ...] = ()
    grouped: bool = True


# The recipes' settings for each device, but for recomputation of activations, which nothing here is too large for.
# Eight rows in an optimiser step on the processor, as in TRL's defaults.
SETTINGS = {
    "cpu": ("batch_size=4", "gradient_accumulation=2", "activation_checkpointing=false"),
    "cuda": ("activation_checkpointing=false",),
}
ABLATIONS = {
    "cpu": (
        Variant("ours, rows in random order", grouped=False),
        Variant("ours, activations recomputed", ("activation_checkpointing=true",)),
        Variant("ours, micro-batches of 8", ("batch_size=8", "gradient_accumulation=1")),
        Variant("ours, 16 rows a step", ("gradient_accumulation=4",)),
        Variant("ours, packs of 1024", ("packing=true", "batch_size=1", "gradient_accumulation=1")),
        Variant("ours, float32", ("bf16=false",)),
    ),
    "cuda": (
        Variant("ours, activations recomputed", ("activation_checkpointing=true",)),
        Variant("ours, one pack at a time", ("batch_size=1", "gradient_accumulation=16")),
        Variant("ours, rows grouped by length", ("packing=false", "batch_size=32", "gradient_accumulation=6")),
        Variant("ours, rows in random order", ("packing=false", "batch_size=32", "gradient_accumulation=6"), False),
        Variant("ours, float32", ("bf16=false",)),
    ),
}


class Clock(TrainerCallback):
    """Seconds from the begin of the first optimiser step to the end of the last one."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = self.started or _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.seconds = _now() - self.started


def questions(cards: Sequence[Card], count: int, seed: int) -> Iterator[Record]:
    """Dialogues without passages: one to three questions about a card, answers of one sentence to a whole section.

    About 70 to 450 tokens with the template's, half of them below 150, which is the spread of short medical
    questions and answers in Chinese.
    """
    rng = random.Random(seed)
    phrasing = Phrasing(rng, "train")
    for index in range(count):
        card, task = rng.choice(cards), rng.choice(TASKS)
        messages = [Message(role="system", content=prompts.prompts()["task_prompts"][task])]
        turns = rng.choices([1, 2, 3], [6, 3, 1])[0]
        for section in rng.sample(list(card.sections.values()), min(turns, len(card.sections))):
            asked = phrasing.named(section.section, rng.choice(card.names), card.asked.get(section.section, ()))
            answer = prompts.lines(section.sentences[: rng.randint(1, len(section.sentences))])
            messages += [Message(role="user", content=asked), Message(role="assistant", content=answer)]
        yield Record(
            id=f"question-{index}", kind="dialogue", task=task, age_group=card.ages, split="train", group=card.id,
            source=Source(name="PediatricsGPT cards", licence="Apache-2.0", reference=card.reference),
            messages=tuple(messages),
        )  # fmt: skip


def build_data(work: Path, short: int, passages: int, seed: int = 3) -> tuple[dict[str, Path], PreTrainedTokenizerFast]:
    """Corpus folders of `short` questions and of `passages` dialogues as recipes have them, and their tokenizer."""
    counts = [f"corpus.dialogues={passages}", f"corpus.task_dialogues={passages}"]
    recipe = load_recipe(Path("demo"), [*CORPUS, *counts, f"seed={seed}"])
    folders = {QUESTIONS: work / "questions", PASSAGES: work / "passages"}
    build_corpus(recipe, folders[PASSAGES])
    assert recipe.corpus.cards is not None
    written = {"sft": questions(load_cards(recipe.corpus.cards), short, seed)}
    write_corpus(folders[QUESTIONS], written, {"name": "questions", "seed": seed})
    return folders, make_tokenizer(recipe, tokenizer_texts(folders[PASSAGES]))


def write_base(folder: Path, shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, device: str) -> int:
    """Writes a checkpoint with random weights that a recipe can name as its `base`; returns its parameters.

    Embeddings are tied, as in Qwen3's models up to 4B; a `shape` without vocab_size takes the tokenizer's.
    """
    options: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, **shape}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(**options, rope_parameters=rope, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def recipe_of(variant: Variant, base: Path, device: str) -> Recipe:
    """The shipped recipe for the device, on `base`, with the variant's settings."""
    origin = [f"base={base}", f"device={device}", "loggers=[]", "stages.sft.evaluate_every=0"]
    if device == "cpu":
        origin += ["model=null", "tokenizer=null"]
    settings = dict(item.split("=") for item in (*SETTINGS[device], *variant.overrides))
    general = {key: settings.pop(key) for key in ("bf16",) if key in settings}
    overrides = [f"{key}={value}" for key, value in general.items()]
    overrides += [f"stages.sft.{key}={value}" for key, value in settings.items()]
    return load_recipe(Path("demo" if device == "cpu" else "qwen3-0.6b"), [*origin, *overrides])


def our_trainer(variant: Variant, base: Path, corpus: Path, output: Path, device: str) -> Any:
    """The trainer of the SFT stage as a run would build it; it writes no checkpoints."""
    recipe, tokenizer = recipe_of(variant, base, device), load_tokenizer(base)
    model = load_model(base, recipe, tokenizer, recipe.stages.sft)
    trainer = stage_trainer("sft", model, tokenizer, recipe, corpus, output)
    trainer.args.save_strategy = "no"
    if not variant.grouped:
        trainer.row_lengths = None
    return trainer


def trl_trainer(base: Path, corpus: Path, output: Path, device: str, accumulation: int) -> Any:
    """TRL's trainer with its defaults: float32 weights, bf16 autocast, recomputation, rows padded in random order.

    `accumulation` gives an optimiser step as many rows as ours has (on the processor 1, the default).
    """
    records = stage_records("sft", corpus)
    rows = [{"messages": [message.model_dump() for message in record.messages or ()]} for record in records]
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True),
        args=SFTConfig(
            output_dir=str(output),
            num_train_epochs=1,
            gradient_accumulation_steps=accumulation,
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
    )


def train(trainer: Any, steps: int = 0) -> dict[str, float]:
    """Trains one epoch, or only `steps`; tokens are counted in the rows, not by the trainer."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.args.max_steps = steps or -1
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    trainer.train()
    return {"tokens": tokens, "seconds": clock.seconds, "steps": trainer.state.global_step}


def measure(base: Path, corpus: Path, device: str, variants: Sequence[Variant], rounds: int) -> dict[str, Any]:
    """Figures of TRL's defaults and of all variants on one corpus folder.

    {"lengths", "mean_length", "variants": {variant: {"tokens_per_second", "over_trl", "over_trl_range", "tokens",
    "seconds", "steps"}}}; `lengths` are the dialogues' tokens at 5, 10, … 95 % of them.
    """
    tokenizer = load_tokenizer(base)
    lengths = [_length(record, tokenizer) for record in stage_records("sft", corpus)]
    stage = recipe_of(variants[0], base, device).stages.sft
    accumulation = max(1, round(rows_in_a_step(stage, fmean(lengths)) / SFTConfig.per_device_train_batch_size))

    with tempfile.TemporaryDirectory() as output:
        makers = {TRL: lambda: trl_trainer(base, corpus, Path(output), device, accumulation)}
        makers |= {v.name: lambda v=v: our_trainer(v, base, corpus, Path(output), device) for v in variants}
        names = list(makers)
        epochs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for make in makers.values():
            train(make(), WARM_UP)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                epochs[name].append(train(makers[name]()))
                gc.collect()  # a trainer's cycles hold its model

    figures = {}
    for name in names:
        speeds = [epoch["tokens"] / epoch["seconds"] for epoch in epochs[name]]
        ratios = [speed / (e["tokens"] / e["seconds"]) for speed, e in zip(speeds, epochs[TRL], strict=True)]
        figures[name] = {
            "tokens_per_second": median(speeds),
            "over_trl": median(ratios),
            "over_trl_range": [min(ratios), max(ratios)],
            "tokens": epochs[name][0]["tokens"],
            "seconds": median(epoch["seconds"] for epoch in epochs[name]),
            "steps": epochs[name][0]["steps"],
        }
    return {"lengths": [round(q) for q in quantiles(lengths, n=20)], "mean_length": fmean(lengths), "variants": figures}


def rows_in_a_step(stage: PackedStage, mean: float) -> float:
    """Rows of `mean` tokens in one optimiser step."""
    units = stage.batch_size * stage.gradient_accumulation
    return units * stage.max_length / mean if stage.packing else units


def run(
    device: str = "cpu",
    short: int | None = None,
    passages: int | None = None,
    rounds: int = 3,
    ablation: bool = False,
    shape: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Measures both kinds of dialogues, `short` and `passages` of them in an epoch.

    Returns {"device", "threads", "load", "parameters", "rounds", "dialogues": {kind: `measure`'s}}. `shape` replaces
    the model's.
    """
    quieten_libraries()
    gpu = device == "cuda"
    load = os.getloadavg()[0]
    variants = [Variant(OURS), *(ABLATIONS[device] if ablation else ())]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        folders, tokenizer = build_data(work, short or (2000 if gpu else 96), passages or (1000 if gpu else 48))
        base = work / "base"
        parameters = write_base(base, shape or (QWEN3_06B if gpu else SMALL), tokenizer, device)
        found = {kind: measure(base, corpus, device, variants, rounds) for kind, corpus in folders.items()}
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "load": [load, os.getloadavg()[0]],
        "parameters": parameters,
        "rounds": rounds,
        "dialogues": found,
    }


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of `run`'s figures, one row per kind of dialogues and variant; the columns are `COLUMNS`."""
    return [
        (
            kind,
            name,
            f"{figure['tokens_per_second']:,.0f}",
            f"{figure['over_trl']:.2f}",
            "–".join(f"{ratio:.2f}" for ratio in figure["over_trl_range"]),
            f"{figure['seconds']:.1f}",
            f"{figure['steps']}",
        )
        for kind, found in figures["dialogues"].items()
        for name, figure in found["variants"].items()
    ]


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Text to the left, figures to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        padded = [text.ljust(width) for text, width in zip(row[:2], widths, strict=False)]
        padded += [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(padded).rstrip())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _length(record: Record, tokenizer: PreTrainedTokenizerFast) -> int:
    rendered: Any = tokenizer.apply_chat_template([m.model_dump() for m in record.messages or ()], return_dict=True)
    return len(rendered["input_ids"])


def main() -> None:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of the processor (default: torch's; 1 beside other load)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, metavar="ROWS", help="questions in an epoch (CPU 96, CUDA 2000)")
    parser.add_argument("--passages", type=int, metavar="ROWS", help="dialogues with passages (CPU 48, CUDA 1000)")
    parser.add_argument("--ablation", action="store_true", help="also change our settings one at a time")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figures = run(arguments.device, arguments.short, arguments.passages, arguments.rounds, arguments.ablation)
    if arguments.json:
        print(json.dumps(figures, ensure_ascii=False, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in figures.items() if key != "dialogues"))
    print_table([COLUMNS, *rows(figures)])


if __name__ == "__main__":
    main()
