"""Writes a tiny random Qwen3 GGUF with its own byte-level BPE tokenizer: real llama.cpp code paths in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The pre-tokenizer of Qwen2, as Hugging Face writes it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "发热的孩子要多喝水。", "孩子咳嗽要数一分钟呼吸次数。", "腹泻时每次稀便后喝口服补液盐。", "根据资料：",
    "您先别着急。", "资料中没有相关内容，请咨询医生。", "如果情况加重，请及时就医。", "我是演示模型，不是医生。",
    "任务：知识问答。循证诊断。治疗推荐。问题：", "system user assistant", "抗生素对病毒没有用，不常规使用抗生素。",
]  # fmt: skip
HEADS, KV_HEADS, HEAD = 4, 2, 16


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with the Qwen2 pre-tokenizer; special tokens have ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    return tokenizer


def write_model(
    path: Path,
    prompts: Mapping[str, Any] | None,
    *,
    tokenizer: Tokenizer | None = None,
    architecture: str = "qwen3",
    template: str | None = TEMPLATE,
    context: int = 2048,
    layers: int = 2,
    width: int = 64,
    forward: int = 128,
    seed: int = 0,
    edit: Any = None,
) -> Path:
    """Write the model; `prompts` (the prompts.json form) None makes a foreign file; `edit(writer)` adds keys."""
    tokenizer = tokenizer or make_tokenizer()
    spec = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(forward)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    if prompts is not None:
        writer.add_uint32("pediatricsgpt.contract", prompts["contract"])
        for key in ("system_prompt", "passage_template", "question_template"):
            writer.add_string(f"pediatricsgpt.{key}", prompts[key])
        for key in ("task_prompts", "phrases"):
            writer.add_string(f"pediatricsgpt.{key}", json.dumps(prompts[key], ensure_ascii=False))
        writer.add_bool("pediatricsgpt.demonstration", prompts["demonstration"])
    if edit:
        edit(writer)
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), width), "output_norm.weight": (width,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (width,), "ffn_norm": (width,), "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,),
                "attn_q": (HEADS * HEAD, width), "attn_k": (KV_HEADS * HEAD, width),
                "attn_v": (KV_HEADS * HEAD, width), "attn_output": (width, HEADS * HEAD),
                "ffn_gate": (forward, width), "ffn_up": (forward, width), "ffn_down": (width, forward),
            }.items()
        }  # fmt: skip
    for name, shape in shapes.items():
        values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.3
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
