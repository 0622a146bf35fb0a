"""Where a run's model comes from: an existing base, a recipe's own shape, or the stage before."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from trainer import prompts
from trainer.bases.baichuan import freeze_head, is_baichuan, llama_config, llama_tokenizer
from trainer.induction import write_induction_heads
from trainer.recipe import DenseStage, Recipe, RecipeError, StageRecipe
from trainer.tokenizer import train_tokenizer

# Templates by the tokens a vocabulary must have for them.
_TEMPLATES = {"<|im_start|>": prompts.chat_template, "<reserved_106>": prompts.baichuan_template}
_END_OF_TURN = {"<|im_start|>": "<|im_end|>", "<reserved_106>": "</s>"}


def on_gpu(recipe: Recipe) -> bool:
    """Whether the recipe trains on a GPU here. Raises RecipeError when it needs one that is not there."""
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "The recipe trains on an NVIDIA GPU (device: cuda), but torch sees none. Install a CUDA build of torch and "
            "check `nvidia-smi`, or train a recipe made for the processor: pediatricsgpt train demo."
        )
    return recipe.device != "cpu" and torch.cuda.is_available()


def model_config(recipe: Recipe, vocab_size: int | None = None) -> PreTrainedConfig:
    """The model's configuration; no weights are read. `vocab_size` replaces the recipe's (a trained vocabulary)."""
    if recipe.base:
        folder = Path(recipe.base)
        return llama_config(folder) if is_baichuan(folder) else _pretrained(AutoConfig, recipe.base)
    shape, tokenizer = recipe.model, recipe.tokenizer
    assert shape is not None
    assert tokenizer is not None
    return Qwen3Config(
        vocab_size=vocab_size or tokenizer.vocab_size,
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
    )


def make_tokenizer(recipe: Recipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The base's tokenizer with our chat template, or one trained on `texts`.

    Raises RecipeError when the base's vocabulary has none of the templates' tokens.
    """
    if recipe.tokenizer and recipe.model:
        return train_tokenizer(texts, recipe.tokenizer, recipe.model.context)
    assert recipe.base is not None
    if is_baichuan(Path(recipe.base)):
        return llama_tokenizer(Path(recipe.base))
    tokenizer: Any = _pretrained(AutoTokenizer, recipe.base)
    vocabulary = tokenizer.get_vocab()
    for token, template in _TEMPLATES.items():
        if token in vocabulary:
            tokenizer.chat_template = template()
            tokenizer.eos_token = _END_OF_TURN[token]
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            return tokenizer
    raise RecipeError(
        f"The vocabulary of {recipe.base} has no chat tokens we know ({', '.join(_TEMPLATES)}), so a dialogue cannot "
        "be written in it. Take a base with ChatML tokens (Qwen2.5, Qwen3) or Baichuan2."
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A Qwen3-architecture model with random weights."""
    set_seed(recipe.seed)
    model = Qwen3ForCausalLM(model_config(recipe, len(tokenizer)))  # type: ignore[arg-type]
    set_ends(model, tokenizer)
    if recipe.model and recipe.model.induction_heads:
        write_induction_heads(model, recipe.seed)
    model.set_attn_implementation(recipe.attention)
    return model.to(getattr(torch, recipe.dtype))


def start_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: StageRecipe | None = None) -> Any:
    """The model the first stage starts from: random weights, or the base as `load_model` loads it."""
    if not recipe.base:
        return new_model(recipe, tokenizer)
    return load_model(recipe.base, recipe, tokenizer, stage)


def load_model(
    folder: Path | str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, stage: StageRecipe | None = None
) -> PreTrainedModel:
    """A dense checkpoint, in the dtype the stage trains (or, without a stage, measures) it in.

    Raises RecipeError when the tokenizer has ids that the model's embedding lacks.
    """
    gpu = on_gpu(recipe)
    trained = isinstance(stage, DenseStage) and stage.method == "full"
    dtype = getattr(torch, recipe.dtype) if trained or not (gpu and recipe.bf16) else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": recipe.attention}
    if stage and stage.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP2 shards 4-bit weights only when they are stored in a floating dtype.
            bnb_4bit_quant_storage=dtype,
        )
        options["device_map"] = {"": torch.cuda.current_device() if gpu else "cpu"}
    model = _pretrained(AutoModelForCausalLM, folder, **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # At its first evaluation on a CPU bitsandbytes would repack 4-bit weights into a form without a backward
            # pass, and training after it would silently lose gradients.
            module.support_avx512bf16_for_cpu = False
    rows = model.get_input_embeddings().num_embeddings
    if not (stage and stage.load_in_4bit) and len(tokenizer) > rows:
        raise RecipeError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model {folder} only {rows} embeddings: they do not "
            "belong together. Take the tokenizer files of this very checkpoint."
        )
    set_ends(model, tokenizer)
    if trained:
        freeze_head(model)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer a run has written into its folder. Raises RecipeError when it cannot be read."""
    return _pretrained(AutoTokenizer, folder)


def set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The turn's end ends a generation: base models name another token."""
    for config in (model.config, model.generation_config):
        if config is not None:
            config.eos_token_id = tokenizer.eos_token_id  # type: ignore[union-attr]
            config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]


def _pretrained(kind: Any, source: Path | str, **options: Any) -> Any:
    """`from_pretrained` of local files only. Raises RecipeError with the remedy when there are none."""
    try:
        return kind.from_pretrained(source, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"{str(source)!r} cannot be loaded ({reason}). A base is a folder with config.json, the weights and the "
            "tokenizer, all whole; `hf download NAME --local-dir FOLDER` fetches one."
        ) from None
