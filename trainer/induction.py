"""Initial weights that can already copy.

A transformer of a few million parameters spends most of a short CPU training on finding its induction heads: on
the random-token exercises of `stages/copying.py` the loss stays at the unigram entropy for hundreds of steps. The
circuit is known (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022), so it
is written into the random weights instead of waited for, and training goes on from there:

- layer 0, head 0 looks one token back: every embedding gets a common direction c, and W_q c is W_k c rotated by RoPE's
  angle of one position, so the scores Σ_f cos θ_f(i−j−1) peak at the token before; it writes that token's embedding,
  projected to head_dim by P, into a second subspace R;
- layer 1, head 0 asks with P (current token) for keys in R (token before): it looks at what followed the last
  occurrence, and writes that token's embedding back, which the tied output layer reads.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3ForCausalLM

_EMBEDDING = 0.06  # standard deviation of the embeddings: tied logits must be able to become certain
_COMMON = 0.7  # length of the common direction relative to a token's own part
_DAMP = 0.3  # random layers must not drown the embeddings
_COPY = 16.0  # gain of the copied embedding in the residual stream
_SHARP = 1.6  # weights of the QK norms: how peaked the two heads' attention is


@torch.no_grad()
def write_induction_heads(model: Qwen3ForCausalLM, seed: int) -> None:
    """Writes the circuit into the first head of layers 0 and 1 of a freshly initialised model (tied embeddings)."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    hidden, size = config.hidden_size, config.head_dim
    # RoPE turns fast pairs within a few positions: they tell neighbours apart. Slow pairs keep what was written.
    pair = torch.arange(size) % (size // 2)
    fast, slow = pair < size * 3 // 32, pair >= size * 6 // 32
    width = int(slow.sum())
    basis = torch.linalg.qr(torch.randn(hidden, 1 + width + size, generator=generator))[0].T
    common, written, read = basis[0], basis[1 : 1 + width], basis[1 + width :]
    embedding: torch.Tensor = model.model.embed_tokens.weight  # type: ignore[assignment]
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * _EMBEDDING)
    embedding.sub_(torch.outer(embedding @ common, common)).add_(common * _EMBEDDING * hidden**0.5 * _COMMON)
    layers: Any = model.model.layers
    for layer in layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight.mul_(_DAMP)
    first, second = (layers[index].self_attn for index in (0, 1))
    for attention in (first, second):
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.fill_(_SHARP)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:size] = 0
        attention.o_proj.weight[:, :size] = 0
    rotary: Any = model.model.rotary_emb
    frequencies = rotary.inv_freq.float().cpu()
    angle = torch.cat([frequencies, frequencies])
    key = fast.float()
    turned = torch.cat([-key[size // 2 :], key[: size // 2]])
    query = key * torch.cos(angle) - turned * torch.sin(angle)  # RoPE's rotation by minus one position
    first.q_proj.weight[:size] = torch.outer(query, common)
    first.k_proj.weight[:size] = torch.outer(key, common)
    first.v_proj.weight[:width] = read[:width]
    first.o_proj.weight[:, :width] = written.T * _EMBEDDING
    rows = slow.nonzero().squeeze(1)
    second.q_proj.weight[rows] = read[:width]
    second.k_proj.weight[rows] = written
    second.v_proj.weight[:size] = read
    second.o_proj.weight[:, :size] = read.T * _EMBEDDING * _COPY
