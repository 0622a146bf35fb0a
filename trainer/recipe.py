"""Strict YAML recipes: one file describes one model, from its corpus to its last stage."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PROJECT = Path(__file__).resolve().parent.parent
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, the cause and the remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CorpusRecipe(_Strict):
    """How many records of each kind are built from which cards."""

    cards: Path
    held_out_cards: tuple[str, ...] = ()
    texts: Count = 0
    selections: Count = 0  # SFT exercises of choosing a passage by its heading
    dialogues: Count = 0
    preferences: Count = 0
    task_dialogues: Count = 0
    held_out: Count = 0


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
    """What every stage has: passes over its data, sequences per step, learning rate."""

    # At most one pass: more steps come from more records, which the corpus draws without end, and a run that is
    # continued in a second pass would not see the same batches.
    epochs: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Count = 20
    max_length: Positive = 1024
    save_every: Positive = 200
    log_every: Positive = 10


class CptRecipe(StageRecipe):
    """Hybrid-instruction CPT; `copy_exercises` among its texts teach the model to read its context."""

    copy_exercises: Count = 0


class DfpoRecipe(StageRecipe):
    """Direct following preference optimization: DPO plus an SFT regulariser on the chosen answer."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    sft_weight: Annotated[float, Field(ge=0)] = 1.0


class MueRecipe(StageRecipe):
    """PSFT with the mixture of universal-specific experts."""

    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    num_specific: Positive = 3


class StagesRecipe(_Strict):
    """The paper's four stages in their order."""

    cpt: CptRecipe
    sft: StageRecipe
    dfpo: DfpoRecipe
    mue: MueRecipe


class Recipe(_Strict):
    """One model."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    seed: int = 0
    bf16: bool = True
    corpus: CorpusRecipe
    tokenizer: TokenizerRecipe
    model: ModelRecipe
    stages: StagesRecipe


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe; raises RecipeError with the nearest valid key for an unknown one."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}. The shipped ones are in trainer/recipes/.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a YAML file in UTF-8: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a recipe: it must hold keys such as name, corpus, model, stages.")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{path}: " + "; ".join(_explain(item) for item in error.errors())) from None
    return recipe.model_copy(
        update={"corpus": recipe.corpus.model_copy(update={"cards": _resolve(recipe.corpus.cards)})}
    )


def _resolve(path: Path) -> Path:
    """Relative paths count from the working folder, else from the project."""
    return path if path.is_absolute() or path.exists() else PROJECT / path


def _explain(error: Any) -> str:
    *parents, key = error["loc"]
    where = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']}"
    model: Any = Recipe
    for part in parents:
        model = model.model_fields[part].annotation
    near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(model.model_fields)}."
    return f"unknown key {where!r}; {hint}"
