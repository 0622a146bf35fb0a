"""FLOPs of a training step, for the model FLOPs utilisation (MFU) of a run and of a plan."""

from __future__ import annotations

from transformers import PreTrainedConfig
from trl.trainer.utils import get_peak_flops

# Dense bf16 FLOP/s with float32 accumulation of cards that TRL's table lacks, from NVIDIA's architecture whitepapers
# (GA102, Ada, RTX Blackwell).
_CONSUMER = {"RTX 3090": 71e12, "RTX 4090": 165.2e12, "RTX 5090": 209.5e12}


def head_dim(config: PreTrainedConfig) -> int:
    """Width of an attention head; Qwen2's and older Llama configurations leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flops_per_token(
    config: PreTrainedConfig, trainable: int, total: int, length: float = 0, checkpointing: bool = False
) -> float:
    """FLOPs that one token costs, forward and backward.

    `trainable` and `total` are parameter counts, `length` is the mean length of a sequence (of a document in a pack):
    0 leaves the attention scores out. A multiply-add is 2 FLOPs, so with N weights that multiply (all but the
    embedding, which is a look-up; the output layer counts, tied or not)

    - forward: 2N, plus the scores and their product with the values: 2 · 2 · heads · head_dim · length/2 a layer,
      because a token attends to half of its sequence on average;
    - gradients of activations: 2N again, and twice the attention;
    - gradients of weights: 2 for each that trains (all of N for full training, next to none for LoRA and MUE).

    MFU counts these only. `checkpointing` adds the second forward pass, which is work of the hardware but not of the
    model.
    """
    look_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    weights = total - look_up
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * head_dim(config) * length
    forward = 2 * weights + attention
    backward = 2 * weights + 2 * attention + 2 * min(trainable, weights)
    return float(forward * (2 if checkpointing else 1) + backward)


def peak_flops(device: str) -> float:
    """Dense bf16 FLOP/s of a GPU by its name, 0 when it is not known."""
    known = get_peak_flops(device, "bfloat16")
    return known or next((peak for name, peak in _CONSUMER.items() if name in device), 0.0)
