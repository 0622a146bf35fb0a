"""Baichuan and Baichuan2 7B checkpoints, converted exactly to the Llama form.

Upstream ships its own modelling code, which cannot run under transformers 5 (cos/sin tables left on the meta device,
tuple caches). The 7B models are Llama models under other names: RMSNorm with fp32 statistics, rotate-half RoPE of base
10000, SwiGLU, no biases. Two things are written differently:

- `W_pack` [3d, d] holds the rows of q_proj, k_proj and v_proj, in this order;
- Baichuan2's NormHead divides every row of `lm_head` by its length before using it. Upstream's README gives the same
  recipe to turn Baichuan 2 into Baichuan 1: store the divided rows once. Baichuan 1 has a plain head.

Logits are equal in fp32. In bf16 they differ by rounding: upstream rotates in fp32, transformers in bf16.

In training the two heads part: NormHead divides anew after every step, a plain head keeps whatever length its rows
grow to, and the scale of the logits with it. So a converted Baichuan2 carries `pediatricsgpt_frozen_head` in its
config.json, which every later save keeps, and `freeze_head` obeys. Adapters on the other layers are exact either way.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from trainer import prompts
from trainer.bases.baichuan_tokenizer import ROLE_TOKENS, convert_tokenizer
from trainer.bases.baichuan_weights import (
    BaichuanError,
    Progress,
    llama_tensors,
    open_tensors,
    read_json,
    write_tensors,
)

__all__ = ["BaichuanError", "convert_baichuan", "freeze_head", "is_baichuan", "llama_config", "llama_tokenizer"]

CHAT_TEMPLATE_FILE = prompts.CHAT_TEMPLATE_FILE.with_name("baichuan_template.jinja")
FROZEN_HEAD = "pediatricsgpt_frozen_head"
_SPARE_BYTES = 64 << 20
_VOCABULARIES = {64000: False, 125696: True}  # Baichuan 1, Baichuan 2: is the head a NormHead?
_SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")


def is_baichuan(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint in Baichuan's own form, of any size."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "baichuan"
    except (OSError, ValueError, AttributeError):
        return False


def freeze_head(model: PreTrainedModel) -> bool:
    """Excludes the output layer of a converted Baichuan2 from training; returns whether it did.

    Any other model is left alone. Call it before a full fine-tuning: a trained plain head is no NormHead any more.
    """
    if not getattr(model.config, FROZEN_HEAD, False):
        return False
    head: Any = model.get_output_embeddings()
    head.requires_grad_(False)
    return True


def llama_config(folder: Path) -> LlamaConfig:
    """The configuration a converted checkpoint has. Raises BaichuanError for everything but a 7B."""
    return _config(read_json(folder / "config.json"), folder)


def llama_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer a converted checkpoint has. Raises BaichuanError."""
    template = CHAT_TEMPLATE_FILE.read_text(encoding="utf-8").strip()
    return convert_tokenizer(folder / "tokenizer.model", template, llama_config(folder).max_position_embeddings)


def convert_baichuan(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Writes the checkpoint folder `source` as a Llama checkpoint with tokenizer and chat template to `target`.

    `source` holds safetensors or .bin files, single or with an index; they stay memory-mapped, so the memory needed
    is that of the head. Types are kept. `progress(file, done, total)` counts tensors and is called after each file
    written. Everything is written to `target`.part and renamed at the end.

    Raises BaichuanError for a model that has no exact Llama form (13B), a damaged checkpoint, an existing target or
    a failing disk.
    """
    if target.exists():
        raise BaichuanError(f"{target} exists already; remove it or choose another folder.")
    config = llama_config(source)
    file = source / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    tensors = open_tensors(source)
    wanted = llama_tensors(config, tensors, source)
    config.dtype = wanted["model.embed_tokens.weight"].dtype
    part = target.with_name(target.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _check_disk(part, sum(tensor.nbytes for tensor in wanted.values()))
        _write_tokenizer(source, part, config, generation)
        config.save_pretrained(part)
        _write_generation_config(part, config, generation)
        write_tensors(part, wanted, tensors, bool(getattr(config, FROZEN_HEAD, False)), progress)
        for file in part.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        part.rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise BaichuanError(f"{target} could not be written ({error}). Make room or choose another folder.") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _config(source: dict[str, Any], folder: Path) -> LlamaConfig:
    """The Llama configuration; raises BaichuanError for everything but a 7B."""
    file = folder / "config.json"
    if source.get("model_type") != "baichuan":
        raise BaichuanError(f"{file}: model_type is {source.get('model_type')!r}; only 'baichuan' is converted here.")
    if absent := [key for key in _SHAPE_KEYS if key not in source]:
        raise BaichuanError(f"{file} lacks {', '.join(absent)}; download the whole checkpoint again.")
    alibi = str(source.get("position_embedding", "")).upper() == "ALIBI" or "max_position_embeddings" not in source
    if alibi or source["num_hidden_layers"] == 40 or source["hidden_size"] == 5120:
        raise BaichuanError(
            f"{file} is a Baichuan 13B. It uses ALiBi instead of rotary positions, which no Llama model can express. "
            "Use Baichuan2-7B-Base or Baichuan2-7B-Chat."
        )
    if source.get("quantization_config"):
        raise BaichuanError(f"{file} is a quantized checkpoint; use the release in bfloat16 or float16.")
    norm_head = _has_norm_head(source, file)
    try:
        config = LlamaConfig(
            **{key: source[key] for key in _SHAPE_KEYS},
            hidden_act=source.get("hidden_act", "silu"),
            max_position_embeddings=source["max_position_embeddings"],
            initializer_range=source.get("initializer_range", 0.02),
            rms_norm_eps=source.get("rms_norm_eps", 1e-6),
            pad_token_id=source.get("pad_token_id", 0),
            bos_token_id=source.get("bos_token_id", 1),
            eos_token_id=source.get("eos_token_id", 2),
            tie_word_embeddings=False,
            # The base stands in upstream's code, not in its config.json.
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            architectures=["LlamaForCausalLM"],
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise BaichuanError(f"{file} is damaged ({error}); download the whole checkpoint again.") from error
    if norm_head:
        setattr(config, FROZEN_HEAD, True)
    return config


def _has_norm_head(source: dict[str, Any], file: Path) -> bool:
    """Baichuan 2 or 1? The weights have the same names, so it is decided as everywhere: by the vocabulary.

    A fine-tuned model with a changed vocabulary still says it by `z_loss_weight`, a key only Baichuan2's own
    configuration class writes. Nothing is guessed beyond that.
    """
    if source["vocab_size"] in _VOCABULARIES:
        return _VOCABULARIES[source["vocab_size"]]
    if "z_loss_weight" in source:
        return True
    raise BaichuanError(
        f"{file}: vocab_size {source['vocab_size']} is neither Baichuan 1 (64000, plain head) nor Baichuan 2 (125696, "
        'normalised head). If the model was made from Baichuan 2, add "z_loss_weight": 0 to the file.'
    )


def _write_tokenizer(source: Path, part: Path, config: LlamaConfig, generation: dict[str, Any]) -> None:
    file = source / "tokenizer.model"
    tokenizer = llama_tokenizer(source)
    if len(tokenizer) > config.vocab_size:
        raise BaichuanError(
            f"{file} has {len(tokenizer)} tokens, the model {config.vocab_size}; take both from one release."
        )
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for role, token in zip(("user", "assistant"), ROLE_TOKENS, strict=True):
        ids[f"{role}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    for key, number in ids.items():
        stated = generation.get(key, getattr(config, key, number))
        if stated != number:
            raise BaichuanError(f"{file}: {key} is {number}, the checkpoint says {stated}; take both from one release.")
    tokenizer.save_pretrained(part)
    # Its scores, which tokenizer.json cannot hold, are what a GGUF of this tokenizer needs.
    shutil.copyfile(file, part / "tokenizer.model")


def _write_generation_config(part: Path, config: LlamaConfig, generation: dict[str, Any]) -> None:
    """Upstream's sampling settings without its role tokens, which the chat template writes."""
    ids = {key: getattr(config, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    kept = {key: generation[key] for key in _SAMPLING_KEYS if key in generation}
    GenerationConfig(**ids, **(kept if kept.get("do_sample") else {})).save_pretrained(part)


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise BaichuanError(
            f"{folder} needs {needed / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free. "
            "Make room or choose a folder on another disk."
        )
