"""Bytes that autograd keeps for the backward pass of a Qwen3, Qwen2 or Llama model, from its configuration.

Every line names what one operation of transformers' modelling code saves; tests/trainer/test_plan.py holds the sum
against `torch.autograd.graph.saved_tensors_hooks` on real models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from trainer.planning.flops import head_dim

_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Batch:
    """A micro-batch as the attention sees it: `rows` sequences of `length` tokens (a packed batch is one row).

    `masked` says whether there is a mask tensor: for packs and for rows of unlike length.
    """

    rows: int
    length: int
    masked: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Training:
    """What decides which activations are kept, beside the model's shape.

    compute: bytes of a number in matrix products (2 under bfloat16 autocast); stream: of the residual stream, which
    has the dtype of the weights. `targets` are the modules with adapters (none: all weights train), `rank` is LoRA's
    r or 0, `experts` (experts, r) of MUE. `cast_inputs`: LoRA over non-quantized weights keeps its own copy of every
    input, because its float32 A makes autocast convert it.
    """

    compute: int = 2
    stream: int = 4
    targets: frozenset[str] = field(default_factory=frozenset)
    rank: int = 0
    experts: tuple[int, int] | None = None
    cast_inputs: bool = False
    attention: str = "sdpa"
    head_norms: bool = True


def saved_by_layer(config: PreTrainedConfig, batch: Batch, training: Training) -> int:
    """Bytes that one decoder layer keeps."""
    return batch.tokens * (_attention(config, batch, training) + _feed_forward(config, training))


def saved(config: PreTrainedConfig, batch: Batch, training: Training, checkpointing: bool) -> int:
    """Bytes that the whole model keeps at the end of its forward pass.

    With activation checkpointing a layer keeps its input alone; its own set exists again, one layer at a time,
    during the backward pass (add `saved_by_layer` for that moment).
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    tokens = batch.tokens
    if checkpointing:
        body = layers * tokens * training.stream * hidden
    else:
        body = layers * saved_by_layer(config, batch, training)
        if training.targets and not training.targets & {"q_proj", "k_proj", "v_proj", "o_proj"}:
            # Below the first adapter nothing trains, so the first layer's attention needs no backward pass.
            body -= tokens * _attention(config, batch, training)
    token = 8  # its number, for the embedding's gradient
    token += 4 * hidden + 4  # final norm: its input in float32 and the inverse root mean square
    token += 0 if training.targets else training.stream * hidden  # … and its result before the trained weight
    token += training.stream * hidden + 32  # the output layer's input, label, log-sum-exp, entropy and masks
    mask = batch.length if batch.masked and not training.attention.startswith("flash") else 0  # booleans
    rotary = 2 * head_dim(config) * training.stream * batch.length  # cosines and sines, the same for all rows
    return body + tokens * (token + mask) + rotary


def mask_bytes(config: PreTrainedConfig, batch: Batch, training: Training, checkpointing: bool) -> int:
    """The part of `saved` that is attention masks: it grows with the square of a row's length."""
    if not batch.masked or training.attention != "sdpa":
        return 0
    copies = 1 if checkpointing else config.num_hidden_layers
    return batch.tokens * batch.length * (1 + copies * training.compute)


def _attention(config: PreTrainedConfig, batch: Batch, training: Training) -> int:
    """Bytes a token in the first half of a layer."""
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * head_dim(config), groups * head_dim(config)
    full, compute = not training.targets, training.compute
    size = _norm(hidden, training)
    size += _inputs(hidden, ("q_proj", "k_proj", "v_proj"), training)
    if training.head_norms:  # RMSNorm of each head of queries and keys, in float32
        size += 4 * (queries + keys) + 4 * (heads + groups) + (compute * (queries + keys) if full else 0)
    flash = training.attention.startswith("flash")
    repeated = training.attention == "eager" or (batch.masked and not flash)
    # Queries, keys, values and the result; without a mask sdpa reads each key head for its group of queries, with one
    # transformers repeats keys and values for all heads. Then the log-sum-exp of each head.
    size += compute * (2 * queries + 2 * (queries if repeated else keys)) + 4 * heads
    if training.attention == "eager":
        # All attention weights: the softmax in float32 and, under autocast, its bfloat16 copy.
        size += heads * batch.length * (4 + (compute if compute < 4 else 0))
    elif batch.masked and not flash:
        size += compute * batch.length  # sdpa turns the boolean mask into an additive one in every layer
    # The output projection's input is the attention's result; only LoRA's own copy of it comes on top.
    copied = training.cast_inputs and "o_proj" in training.targets
    return size + (compute * queries if copied else 0) + _low_rank(("q_proj", "k_proj", "v_proj", "o_proj"), training)


def _feed_forward(config: PreTrainedConfig, training: Training) -> int:
    """Bytes a token in the second half of a layer."""
    width = config.intermediate_size
    size = _norm(config.hidden_size, training)
    size += _inputs(config.hidden_size, ("gate_proj", "up_proj"), training)
    size += 3 * training.compute * width  # gate, silu(gate) and up
    if not training.targets or "down_proj" in training.targets:
        size += training.compute * width  # their product, the input of down_proj
    return size + _low_rank(("gate_proj", "up_proj", "down_proj"), training)


def _norm(hidden: int, training: Training) -> int:
    """RMSNorm: its input in float32, the inverse root mean square and, for the weight's gradient, its result."""
    return 4 * hidden + 4 + (0 if training.targets else training.stream * hidden)


def _inputs(hidden: int, names: tuple[str, ...], training: Training) -> int:
    """The input that several projections share, kept where a weight's gradient needs it."""
    if not training.targets:
        # Autocast converts a float32 input once for each projection and keeps every copy.
        converted = training.stream != training.compute
        return training.compute * hidden * (len(names) if converted else 1)
    targeted = sum(name in training.targets for name in names)
    if training.cast_inputs:
        return training.compute * hidden * targeted
    return training.stream * hidden if targeted else 0


def _low_rank(names: tuple[str, ...], training: Training) -> int:
    """What the adapters of some projections keep, apart from their inputs."""
    targeted = sum(name in training.targets for name in names)
    if training.experts:
        experts, rank = training.experts
        # The hidden activations before and after their gates, router and noise logits, the gates; softmax in float32.
        token = training.compute * (2 * experts * rank + 2 * (experts - 1) + experts) + 4 * 3 * (experts - 1)
        return targeted * token
    return targeted * training.compute * training.rank


def all_targets(targets: tuple[str, ...] | str) -> frozenset[str]:
    """The target modules of a recipe; "all-linear" is PEFT's word for every projection."""
    return frozenset(_ALL if targets == "all-linear" else targets)
