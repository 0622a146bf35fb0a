"""Strict YAML recipes: one file describes one model, from its corpus to its last stage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED = Path(__file__).resolve().parent / "recipes"
STAGES = ("cpt", "sft", "dfpo", "mue")
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, the cause and the remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CorpusRecipe(_Strict):
    """Either how many records of each kind are built from which cards, or a finished corpus folder (`records`)."""

    cards: Path | None = None
    records: Path | None = None
    held_out_cards: tuple[str, ...] = ()
    texts: Count = 0
    selections: Count = 0  # SFT exercises of choosing a passage by its heading
    dialogues: Count = 0
    preferences: Count = 0
    task_dialogues: Count = 0
    held_out: Count = 0

    @model_validator(mode="after")
    def _has_one_source(self) -> CorpusRecipe:
        if (self.cards is None) == (self.records is None):
            raise ValueError("give either `cards` (a folder of cards) or `records` (a finished corpus folder)")
        fields = type(self).model_fields
        built = {
            name for name in fields if name not in ("cards", "records") and getattr(self, name) != fields[name].default
        }
        if self.records and built:
            raise ValueError(f"{', '.join(sorted(built))} count what is built from cards; `records` is already built")
        return self


class TokenizerRecipe(_Strict):
    """Byte-level BPE with the Qwen2 pre-tokenizer; one token per common character."""

    vocab_size: Positive
    all_characters: bool = False


class ModelRecipe(_Strict):
    """Shape of a Qwen3-architecture model trained from scratch."""

    hidden_size: Positive
    layers: Positive
    intermediate_size: Positive
    heads: Positive
    key_value_heads: Positive
    head_dim: Positive
    context: Positive
    rope_theta: Annotated[float, Field(gt=1)] = 1e6
    # Start with copying heads already written into layers 0 and 1 (trainer/induction.py).
    induction_heads: bool = False

    @model_validator(mode="after")
    def _can_be_built(self) -> ModelRecipe:
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of key_value_heads ({self.key_value_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs")
        if self.induction_heads and (self.layers < 2 or self.hidden_size < 2 * self.head_dim or self.head_dim < 32):
            raise ValueError("induction_heads need 2 layers, head_dim ≥ 32 and hidden_size ≥ 2 · head_dim")
        return self


class StageRecipe(_Strict):
    """What every stage has. A key that a stage leaves out has the value of the stage before it."""

    batch_size: Positive  # sequences (or packs) per device and micro-batch
    gradient_accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Count = 0  # 0: as many as the epochs have
    warmup_steps: Annotated[float, Field(ge=0)] = 20  # below 1: a share of all steps
    max_length: Annotated[int, Field(ge=16)] = 1024
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    activation_checkpointing: bool = False
    load_in_4bit: bool = False
    log_every: Positive = 10
    save_every: Positive = 200
    evaluate_every: Count = 0  # 0: only before and after the stage
    patience: Count = 0  # evaluations without a better held-out loss until the stage stops; 0: never
    keep: Literal["last", "best"] = "last"  # which weights the stage hands on

    @model_validator(mode="after")
    def _can_evaluate(self) -> StageRecipe:
        if (self.patience or self.keep == "best") and not self.evaluate_every:
            raise ValueError("`patience` and `keep: best` compare evaluations: set evaluate_every")
        if self.keep == "best" and self.save_every != self.evaluate_every:
            raise ValueError(
                f"`keep: best` needs a checkpoint at each evaluation: save_every ({self.save_every}) must equal "
                f"evaluate_every ({self.evaluate_every})"
            )
        return self


class PackedStage(StageRecipe):
    """A stage over single sequences: short ones can share a pack, without attention between them."""

    packing: bool = False


class DenseStage(StageRecipe):
    """A stage that hands on a dense model: all parameters train, or a LoRA that is merged at the end."""

    method: Literal["full", "lora"] = "full"
    lora_r: Positive = 64
    lora_alpha: Positive = 64
    lora_targets: tuple[str, ...] = _ALL_LINEAR

    @model_validator(mode="after")
    def _can_train(self) -> DenseStage:
        if self.load_in_4bit and self.method == "full":
            raise ValueError("4-bit weights cannot be trained: set method to lora (QLoRA) or load_in_4bit to false")
        if {"lm_head", "embed_tokens"} & {target.rpartition(".")[2] for target in self.lora_targets}:
            raise ValueError(
                "lora_targets may not name lm_head or embed_tokens: the loss reads the output layer directly, "
                "so an adapter on it would never train. Leave it out or set method to full"
            )
        return self


class CptRecipe(PackedStage, DenseStage):
    """Hybrid-instruction CPT; `copy_exercises` among its texts teach a new model to read its context."""

    copy_exercises: Count = 0


class SftRecipe(PackedStage, DenseStage):
    """SFT on dialogues, the assistant's tokens only."""


class DfpoRecipe(DenseStage):
    """Direct following preference optimization: DPO plus an SFT regulariser on the chosen answer."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    sft_weight: Annotated[float, Field(ge=0)] = 1.0
    # Off: the reference answers at every step, by a second copy of the model (full) or with the adapter off (lora).
    precompute_reference: bool = True


class MueRecipe(PackedStage):
    """PSFT with the mixture of universal-specific experts."""

    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    num_specific: Positive = 3
    target_modules: tuple[str, ...] | Literal["all-linear"] = ("gate_proj", "up_proj", "down_proj")


class StagesRecipe(_Strict):
    """The paper's four stages in their order."""

    cpt: CptRecipe
    sft: SftRecipe
    dfpo: DfpoRecipe
    mue: MueRecipe

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        stages, carried = dict(data), {}
        for name in STAGES:
            if not isinstance(stages.get(name), dict):
                continue
            known = cls.model_fields[name].annotation.model_fields  # type: ignore[union-attr]
            stages[name] = {key: value for key, value in carried.items() if key in known} | stages[name]
            carried |= {key: value for key, value in stages[name].items() if key in _SHARED}
        return stages


_SHARED = {**PackedStage.model_fields, **DenseStage.model_fields}


class Recipe(_Strict):
    """One model, made from an existing `base` or, with `model` and `tokenizer`, from nothing."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    seed: int = 0
    # A folder with a Hugging Face checkpoint, or the name of one that is already in the local hub cache.
    base: str | None = None
    tokenizer: TokenizerRecipe | None = None
    model: ModelRecipe | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    bf16: bool = True  # matrix products in bfloat16 (autocast)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of trained weights; frozen ones: bfloat16 on a GPU with bf16
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    corpus: CorpusRecipe
    stages: StagesRecipe

    @model_validator(mode="after")
    def _has_one_origin(self) -> Recipe:
        if self.base and (self.model or self.tokenizer):
            raise ValueError("`base` brings its own shape and vocabulary: leave out model and tokenizer")
        if not self.base and not (self.model and self.tokenizer):
            raise ValueError(
                "give either `base` (a checkpoint) or both `model` and `tokenizer` (to start from nothing)"
            )
        return self

    def stage(self, name: str) -> StageRecipe:
        """Settings of one stage of STAGES."""
        return getattr(self.stages, name)

    def inheritance(self, name: str) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
        """What a stage inherits, and what it sets otherwise: {key: value}, {key: (before, now)}.

        "Before" is the nearest earlier stage that has the key. The first stage inherits nothing.
        """
        inherited, overridden = {}, {}
        earlier = [self.stage(stage) for stage in STAGES[: STAGES.index(name)]]
        for key in type(self.stage(name)).model_fields:
            owner = next((stage for stage in reversed(earlier) if key in type(stage).model_fields), None)
            if owner is None or key not in _SHARED:
                continue
            before, now = getattr(owner, key), getattr(self.stage(name), key)
            if before == now:
                inherited[key] = now
            else:
                overridden[key] = (before, now)
        return inherited, overridden


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file, or a shipped one by its name, and applies overrides such as ``stages.sft.epochs=2``.

    Raises RecipeError, with the nearest valid key for an unknown one.
    """
    shipped = shipped_recipes()
    if not path.is_file() and str(path) in shipped:
        path = shipped[str(path)]
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}. Shipped: {', '.join(shipped)}.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a YAML file in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a recipe: it must hold keys such as name, corpus, model, stages.")
    for override in overrides:
        _override(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(dict.fromkeys(map(_explain, error.errors())))) from None
    if recipe.corpus.cards is None:
        return recipe
    corpus = recipe.corpus.model_copy(update={"cards": _resolve(recipe.corpus.cards)})
    return recipe.model_copy(update={"corpus": corpus})


def _override(data: dict[str, Any], override: str) -> None:
    """Sets one dotted key; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r} is no override: write KEY=VALUE, for example stages.sft.epochs=2.")
    *parents, last = key.split(".")
    place: Any = data
    for part in parents:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise RecipeError(f"{override!r}: {part} is a value, it has no keys.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML: {error}") from None
    place[last] = _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 (without a point) as text."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _resolve(path: Path) -> Path:
    """Relative paths count from the working folder, else from the project."""
    return path if path.is_absolute() or path.exists() else PROJECT / path


def _explain(error: Mapping[str, Any]) -> str:
    *parents, key = error["loc"] or ("recipe",)
    where = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    model: Any = Recipe
    for part in parents:
        model = next(_models(model.model_fields[part].annotation))
    near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(model.model_fields)}."
    return f"unknown key {where!r}; {hint}"


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation such as ``ModelRecipe | None``."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _models(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
