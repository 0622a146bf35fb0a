"""Whether a well-formed GGUF is a model that llama.cpp can open without ending the process.

llama.cpp answers many wrong values with an assertion, which kills whoever called it. Each check names the
assertion or exception it stands before, by the function in llama.cpp's src/.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from quantize.header import BOOL, F32, I32, STRING, U32, Array, Header, Malformed

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_TEMPLATE = 64 << 10
_MAX_WIDTH = 1 << 20  # of any dimension; keeps llama.cpp's 32-bit products from overflowing
ARCHITECTURES = frozenset({"qwen3", "qwen2", "llama", "baichuan"})
_SPLITTERS = frozenset({
    "default", "qwen2", "llama-bpe", "llama3", "llama-v3", "deepseek-r1-qwen", "deepseek-llm", "deepseek-coder",
    "deepseek-v3", "smollm", "smaug-bpe", "gpt-2", "gpt-4o", "tekken", "falcon3", "kormo", "megrez", "seed-coder",
    "starcoder", "refact", "command-r", "stablelm2", "chatglm-bpe", "glm4", "hunyuan", "qwen35",
})  # fmt: skip
_ADDS_BOS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken", "chatglm-bpe"})
_TOKENS = "tokenizer.ggml."
_ROPE_SCALINGS = frozenset({"none", "linear", "yarn", "longrope"})
# Kinds of layers that our architectures do not have; llama.cpp asserts relations between these numbers.
_MUST_BE_ZERO = (
    "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "nextn_predict_layers",
)  # fmt: skip
# Integers and the types of intermediate results, with which llama.cpp does not compute, and Q1_0, which the gguf
# package cannot read.
_NO_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q1_0"})


def check(head: Header) -> None:
    """Raises Malformed naming the first thing that makes the file unusable."""
    for problem in itertools.chain(_model(head), _vocabulary(head), _tensors(head)):
        raise Malformed(problem)


class _Keys:
    """Metadata by name with the type it must have. Raises Malformed."""

    def __init__(self, head: Header, prefix: str) -> None:
        self._head, self._prefix = head, prefix

    def get(self, name: str, kind: int, default: Any = None) -> Any:
        key = self._prefix + name
        if key not in self._head.metadata:
            return default
        if self._head.kinds[key] != kind:
            raise Malformed(f"{key} has the wrong type")
        return self._head.metadata[key]

    def array(self, name: str, kind: int) -> Array | None:
        value = self._head.metadata.get(self._prefix + name)
        if value is not None and not (isinstance(value, Array) and value.kind == kind):
            raise Malformed(f"{self._prefix}{name} is no array of the right type")
        return value

    def number(self, name: str, default: int | None = None) -> int:
        value = self.get(name, U32, default)
        if value is None or not 0 < value <= _MAX_WIDTH:
            raise Malformed(f"{self._prefix}{name} is {'missing' if value is None else value}")
        return value


def _model(head: Header) -> Iterator[str]:
    general = _Keys(head, "general.")
    if general.get("architecture", STRING) not in ARCHITECTURES:
        yield f"the architecture {head.architecture!r} is not one of {', '.join(sorted(ARCHITECTURES))}"
    if general.get("type", STRING, "model") != "model":
        yield f"it is no model but a file of type {head.metadata['general.type']!r}"
    if head.metadata.get("split.count") not in (None, 0, 1):
        yield "it is one part of a model in several files"
    general.get("name", STRING)
    general.get("file_type", U32)
    keys = _Keys(head, f"{head.architecture}.")
    if keys.number("block_count") > MAX_LAYERS:  # load_hparams asserts
        yield f"it claims {keys.number('block_count')} layers; {MAX_LAYERS} are possible"
    for name in ("embedding_length", "feed_forward_length", "attention.head_count"):
        keys.number(name)
    if not keys.get("context_length", U32):
        yield f"{head.architecture}.context_length is missing or zero"
    epsilon = keys.get("attention.layer_norm_rms_epsilon", F32)
    if epsilon is None or not 0 < epsilon < 1:
        yield f"{head.architecture}.attention.layer_norm_rms_epsilon is {epsilon}"
    for name in _MUST_BE_ZERO:
        if keys.get(name, U32, 0):
            yield f"{head.architecture}.{name} is set; mixture-of-experts files cannot be read here"
    yield from _rope(keys)
    heads, groups = keys.number("attention.head_count"), _groups(keys)
    key, value, turned = _widths(keys)
    if heads % groups or key != value or key != turned or key % 2:  # the graphs of all four assert so
        yield f"its attention ({heads} heads, {groups} groups, widths {key}, {value}, {turned}) does not fit together"


def _rope(keys: _Keys) -> Iterator[str]:
    for name in ("rope.freq_base", "rope.scaling.factor", "rope.scale_linear"):
        value = keys.get(name, F32, 1.0)
        if not (math.isfinite(value) and value > 0):
            yield f"{name} is {value}"
    if keys.get("rope.scaling.type", STRING, "none") not in _ROPE_SCALINGS:  # load_hparams asserts
        yield "rope.scaling.type is unknown"


def _groups(keys: _Keys) -> int:
    return keys.number("attention.head_count_kv", keys.number("attention.head_count"))


def _widths(keys: _Keys) -> tuple[int, int, int]:
    """Of a head's key, of its value, and how much of it is rotated."""
    width = keys.number("embedding_length") // keys.number("attention.head_count")
    key = keys.number("attention.key_length", width)
    return key, keys.number("attention.value_length", width), keys.number("rope.dimension_count", key)


def _vocabulary(head: Header) -> Iterator[str]:
    keys = _Keys(head, _TOKENS)
    tokens = keys.array("tokens", STRING)
    model = keys.get("model", STRING)
    if tokens is None or not len(tokens) or model not in ("gpt2", "llama"):
        yield f"it has no vocabulary of a kind that can be read (tokenizer.ggml.model is {model!r})"
        return
    texts = tokens.pieces()
    try:
        b"\n".join(texts).decode("utf-8")  # a line break is no part of any other character
    except UnicodeDecodeError:
        yield "a token is not UTF-8"
    # llama_vocab::load asserts that no text occurs twice, after it cut each at a zero byte and named the empty ones.
    plain = [
        text.partition(b"\0")[0] or b"[EMPTY_%d]" % number if b"\0" in text or not text else text
        for number, text in enumerate(texts)
    ]
    if len(set(plain)) != len(plain):
        yield "the same token occurs twice in its vocabulary"
    types, scores = keys.array("token_type", I32), keys.array("scores", F32)
    for name, array in (("token_type", types), ("scores", scores)):
        if array is not None and len(array) != len(tokens):
            yield f"tokenizer.ggml.{name} has {len(array)} entries for {len(tokens)} tokens"
    if scores is not None and not np.isfinite(np.frombuffer(scores.data, np.float32)).all():
        yield "tokenizer.ggml.scores holds values that are not finite"
    if types is None:
        yield "tokenizer.ggml.token_type is missing"
    yield from _bpe(keys) if model == "gpt2" else _unigram(plain, scores)
    yield from _special(head, keys, len(tokens), model)
    template = head.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        yield "its chat template is no text or far too long"


def _bpe(keys: _Keys) -> Iterator[str]:
    merges = keys.array("merges", STRING)
    if merges is None or not len(merges):
        yield "tokenizer.ggml.merges is missing; every text would fall into bytes"
    if keys.get("pre", STRING, "default") not in _SPLITTERS:
        yield f"the pre-tokenizer {keys.get('pre', STRING)!r} is unknown"


def _unigram(tokens: list[bytes], scores: Array | None) -> Iterator[str]:
    # Tokenising a character that no token covers throws through llama.cpp's C interface, which ends the process.
    if not {b"<0x%02X>" % byte for byte in range(256)} <= set(tokens):
        yield "its vocabulary lacks byte tokens (<0x00> to <0xFF>)"
    if scores is None:
        yield "tokenizer.ggml.scores is missing"


def _special(head: Header, keys: _Keys, count: int, model: str) -> Iterator[str]:
    for key in head.metadata:
        if key.startswith(_TOKENS) and key.endswith("_token_id"):
            value = keys.get(key.removeprefix(_TOKENS), U32)
            if value >= count:
                yield f"{key} is {value}, the vocabulary has {count} tokens"
    for name in ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"):
        keys.get(name, BOOL)
    if keys.get("eos_token_id", U32) is None:
        yield "tokenizer.ggml.eos_token_id is missing; no answer would ever end"
    adds = model == "llama" or keys.get("pre", STRING) in _ADDS_BOS
    if keys.get("add_bos_token", BOOL, adds) and keys.get("bos_token_id", U32) is None:  # tokenize asserts
        yield "tokenizer.ggml.add_bos_token is set without a bos_token_id"


def _tensors(head: Header) -> Iterator[str]:
    keys = _Keys(head, f"{head.architecture}.")
    for name, shape in required(head.architecture, keys, len(head.metadata[f"{_TOKENS}tokens"])):
        tensor = head.tensors.get(name)
        if tensor is None:
            yield f"the tensor {name} is missing"
        elif tensor.shape != shape:
            yield f"the tensor {name} has the shape {tensor.shape}, expected {shape}"
    for name, tensor in head.tensors.items():
        # Computing with them aborts: norms and biases must be F32.
        if (len(tensor.shape) == 1 and tensor.kind.name != "F32") or tensor.kind.name in _NO_WEIGHTS:
            yield f"the tensor {name} has the type {tensor.kind.name}, which cannot be used"


def required(architecture: str, keys: _Keys, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes every file of an architecture has. llama.cpp loads a Qwen2 without its biases; it is garbage."""
    width, inner, heads = (keys.number(n) for n in ("embedding_length", "feed_forward_length", "attention.head_count"))
    head, _, _ = _widths(keys)
    queries, groups = heads * head, _groups(keys) * head
    yield "token_embd.weight", (vocabulary, width)
    yield "output_norm.weight", (width,)
    if architecture == "baichuan":
        yield "output.weight", (vocabulary, width)
    layer: list[tuple[str, tuple[int, ...]]] = [
        ("attn_norm.weight", (width,)),
        ("attn_q.weight", (queries, width)),
        ("attn_k.weight", (groups, width)),
        ("attn_v.weight", (groups, width)),
        ("attn_output.weight", (width, queries)),
        ("ffn_norm.weight", (width,)),
        ("ffn_gate.weight", (inner, width)),
        ("ffn_up.weight", (inner, width)),
        ("ffn_down.weight", (width, inner)),
    ]
    if architecture == "qwen3":
        layer += [("attn_q_norm.weight", (head,)), ("attn_k_norm.weight", (head,))]
    if architecture == "qwen2":
        layer += [("attn_q.bias", (queries,)), ("attn_k.bias", (groups,)), ("attn_v.bias", (groups,))]
    for number in range(keys.number("block_count")):
        yield from ((f"blk.{number}.{name}", shape) for name, shape in layer)
