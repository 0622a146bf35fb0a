"""Before the first stage: everything that can be wrong is found here, and what a run needs is put into its folder."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from accelerate.utils import parse_flag_from_env
from rich.console import Console

from trainer.bases.baichuan import convert_baichuan, is_baichuan
from trainer.corpus.build import MANIFEST, build_corpus, check_records, is_current
from trainer.corpus.record import CorpusError, read_records
from trainer.folder import RunError, RunFolder
from trainer.origin import make_tokenizer, model_config
from trainer.planning.disk import disk
from trainer.planning.shapes import stage_parameters
from trainer.recipe import STAGES, Recipe, RecipeError
from trainer.stages.build import evaluation_file, stage_records, tokenizer_texts

_ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
_SENTENCEPIECE = "tokenizer.model"  # its scores are what a GGUF file of such a vocabulary needs


def check_machine(recipe: Recipe) -> None:
    """Packages that only some recipes need, and what a launcher can set that a run cannot use. Raises RecipeError."""
    quantized = any(recipe.stage(name).load_in_4bit or "8bit" in recipe.stage(name).optimizer for name in STAGES)
    wanted = {**dict.fromkeys(recipe.loggers, "loggers"), **({"bitsandbytes": "qlora"} if quantized else {})}
    for package, extra in wanted.items():
        if find_spec(package) is None:
            raise RecipeError(
                f"The recipe uses {package}, which is not installed. Add it with: pip install 'pediatricsgpt[{extra}]'."
            )
    package = _ATTENTION.get(recipe.attention)
    if package and find_spec(package) is None:
        raise RecipeError(
            f"attention: {recipe.attention} needs {package}, which is not installed (pip install flash-attn, on a "
            "machine with CUDA). attention: sdpa works everywhere."
        )
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    small = [name for name in STAGES if "8bit" in recipe.stage(name).optimizer]
    if sharded and small:
        raise RecipeError(
            f"stages.{small[0]}.optimizer: bitsandbytes' 8-bit optimizers cannot update weights that FSDP shards. "
            "Take optimizer: adamw; its states are sharded already."
        )
    if sharded and parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        # It repeats a layer with other random numbers, so the routers' noise would get gradients of another noise.
        raise RecipeError(
            "FSDP's own activation checkpointing does not keep the random state, which MUE's router noise needs. Set "
            "fsdp_activation_checkpointing: false in the launcher's file, and activation_checkpointing=true for the "
            "stages of the recipe that need it."
        )


def open_run(
    recipe: Recipe, folder: RunFolder, corpus: Path, processes: int, accept_changes: bool, console: Console
) -> None:
    """Corpus, run folder, base and tokenizer, made by the main process.

    Raises RunError, CorpusError, RecipeError.
    """
    _check_targets(recipe)
    if folder.read():
        folder.check_recipe(recipe, accept_changes, console)
        # A run goes on with the corpus it began with. Cards or phrasings that changed since would make another one.
        if not (corpus / MANIFEST).exists():
            _make_corpus(recipe, corpus, console)
        folder.check_corpus(corpus)
        _check_files(recipe, corpus)
        folder.check_base(recipe)
        folder.tidy()
        done = ", ".join(folder.record["stages"]) or "none"
        console.print(f"Continuing {folder.path} (stages done: {done})", soft_wrap=True)
    else:
        _make_corpus(recipe, corpus, console)
        _check_files(recipe, corpus)
        _check_disk(recipe, folder.path)
        folder.create(recipe, corpus, processes)
    _convert_base(recipe, folder, console)
    if not folder.tokenizer.exists():
        _write_tokenizer(recipe, folder, corpus)


def based(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the converted base, if there was one to convert."""
    return recipe.model_copy(update={"base": str(folder.base)}) if folder.base.exists() else recipe


def _check_targets(recipe: Recipe) -> None:
    """Adapters must find their modules now, and not when their stage is reached after hours. Raises RecipeError."""
    config = model_config(recipe)
    for name in STAGES:
        stage_parameters(recipe, name, config)


def _make_corpus(recipe: Recipe, corpus: Path, console: Console) -> None:
    if recipe.corpus.records:
        check_records(corpus)
    elif (corpus / MANIFEST).exists() and not is_current(corpus, recipe):
        # Another run may go on with it.
        raise CorpusError(
            f"{corpus} was built from another recipe, other cards or another seed. Give another --corpus FOLDER, or "
            "replace it: pediatricsgpt corpus RECIPE."
        )
    elif not (corpus / MANIFEST).exists():
        console.print(f"Building the corpus {corpus} …")
        build_corpus(recipe, corpus)


def _check_files(recipe: Recipe, corpus: Path) -> None:
    """Every stage must find records, also those it is evaluated on, before the first one trains for hours."""
    for name in STAGES:
        stage_records(name, corpus, 1)
        file = evaluation_file(name, corpus)
        if recipe.stage(name).evaluate_every and not (file.exists() and list(islice(read_records(file), 1))):
            raise CorpusError(
                f"{file} has no records, but {name} is to be evaluated on them. Give the corpus some "
                f"(corpus.held_out), or set stages.{name}.evaluate_every=0."
            )


def _check_disk(recipe: Recipe, folder: Path) -> None:
    base = Path(recipe.base or "")
    converted = sum(file.stat().st_size for file in base.iterdir()) if recipe.base and is_baichuan(base) else 0
    needed, free = disk(recipe).total + converted, shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder} needs {needed / 2**30:.1f} GiB for its stages and checkpoints, but {free / 2**30:.1f} GiB are "
            "free. Make room, give an --output on another disk, or see what takes it: pediatricsgpt plan."
        )


def _convert_base(recipe: Recipe, folder: RunFolder, console: Console) -> None:
    """Baichuan's own code cannot run in this transformers; its 7B models have an exact Llama form."""
    source = Path(recipe.base or "")
    if recipe.base and is_baichuan(source) and not folder.base.exists():
        with console.status(f"converting {source} to the Llama form"):
            convert_baichuan(source, folder.base)


def _write_tokenizer(recipe: Recipe, folder: RunFolder, corpus: Path) -> None:
    part = folder.tokenizer.with_name("tokenizer.part")
    make_tokenizer(based(recipe, folder), tokenizer_texts(corpus)).save_pretrained(part)
    if (folder.base / _SENTENCEPIECE).exists():
        shutil.copyfile(folder.base / _SENTENCEPIECE, part / _SENTENCEPIECE)
    part.rename(folder.tokenizer)
