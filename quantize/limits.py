"""How far a file may be from what it was made of: beyond these numbers it is broken, not merely compressed."""

from __future__ import annotations

import math

# Mean KL divergence in nats of Llama 3 8B on WikiText, by type: tools/perplexity/README.md of llama.cpp, the larger
# of its rows with and without importance matrix; Q5_0 and Q4_K_S beside their neighbours of the same size.
_KLD_8B = {
    "Q8_0": 0.0014, "Q6_K": 0.0055, "Q5_K_M": 0.011, "Q5_K_S": 0.013, "Q5_0": 0.022, "Q5_1": 0.022,
    "Q4_K_M": 0.031, "Q4_K_S": 0.043, "IQ4_NL": 0.040, "IQ4_XS": 0.040, "Q4_1": 0.072, "Q4_0": 0.072,
    "Q3_K_L": 0.087, "Q3_K_M": 0.102, "Q3_K_S": 0.228, "IQ3_M": 0.103, "IQ3_S": 0.111, "IQ3_XS": 0.139,
    "IQ3_XXS": 0.184, "IQ2_M": 0.326, "Q2_K": 0.445, "Q2_K_S": 0.480, "IQ2_S": 0.439, "IQ2_XS": 0.546,
    "IQ2_XXS": 0.812,
}  # fmt: skip
# Smaller models lose more: (parameters from which it holds, factor). Of the 8B figures, a trained model of 5 million
# parameters showed 1.5 times (Q8_0), 3.5 times (Q4_K_M) and 2.0 times (Q4_0), one of 1 million less than its own, and
# random ones of half a million 2.6 times (Q8_0); the rest is room for other texts, types and seeds.
_SIZES = ((3e9, 4.0), (3e8, 6.0), (0.0, 10.0))
_MOST = 1.0  # a file that loses more says something else
# Unquantized files against the model in float32. llama.cpp rounds the activations of each product to the type of the
# weights, which no file can help. Random models of two layers showed 9e-12, 2e-6 and 1.3e-4, trained ones of 6 million
# parameters 1e-10 in float32; deep models add up more.
_KLD_FLOAT = {"F32": 1e-6, "F16": 1e-4, "BF16": 2e-3}
# Two best logits closer than this may change places through that rounding: 4 times the largest gap in those models.
_TIE = {"F32": 1e-4, "F16": 1e-2, "BF16": 0.25}

# Relative error ‖w − w'‖ / ‖w‖ of one tensor, per stored type; twice what Gaussian weights give.
_WEIGHTS = {"F32": 1e-6, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.012, "Q6_K": 0.04, "Q5_1": 0.08, "Q5_0": 0.09}
_WEIGHTS_BY_BITS = {"5": 0.08, "4": 0.2, "3": 0.4, "2": 0.7, "1": 1.0}

FLOATS = frozenset(_KLD_FLOAT)


def kld(quant: str, parameters: int) -> float:
    """Largest mean KL divergence in nats that passes."""
    if quant in _KLD_FLOAT:
        return _KLD_FLOAT[quant]
    factor = next(factor for size, factor in _SIZES if parameters >= size)
    return min(_MOST, factor * _KLD_8B.get(quant, 2.5))  # the README's 1-bit types


def kld_99(quant: str, parameters: int) -> float:
    """Largest KL divergence in nats of the position that one in a hundred exceeds.

    Ten times the mean's limit: on small trained models it was 5 to 14 times the mean, which was far below its limit.
    """
    return 10 * kld(quant, parameters)


def agreement(quant: str, parameters: int) -> float:
    """Least share of positions with the same best token: 1 − √KLD, as probabilities move with the root of the KLD.

    The README's 8B figures and the small models here agree far more often (Q4_K_M: 0.92, 0.90, 0.91).
    """
    return 1 - min(1.0, math.sqrt(kld(quant, parameters)))


def perplexity(quant: str, parameters: int) -> float:
    """Largest ratio of perplexities that passes.

    In that README the ratio's logarithm is about the mean KL divergence for every type down to 2 bits. Rounding alone
    moves it by no more than a standard deviation of the logits' noise, √(2·KLD).
    """
    limit = kld(quant, parameters)
    return math.exp(math.sqrt(2 * limit) if quant in FLOATS else min(2.0, limit))


def tie(quant: str) -> float:
    """Gap of the two best logits below which another best token counts as a tie."""
    return _TIE.get(quant, _TIE["F32"])


def weight_error(kind: str) -> float:
    """Largest relative error of a tensor of a stored type that passes."""
    if kind in _WEIGHTS:
        return _WEIGHTS[kind]
    return _WEIGHTS_BY_BITS.get(next((letter for letter in kind if letter.isdigit()), "1"), 1.0)
