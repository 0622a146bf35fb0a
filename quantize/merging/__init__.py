"""The experts of a MUE adapter merged into dense weights, and what that costs.

A dense weight cannot know the token, so the gates g_e(x) of ``s · (B_0 A_0 x + Σ_e g_e(x) B_e A_e x)`` must go. Only
collect.py, least_squares.py, measure.py and merge.py import torch.
"""

from quantize.merging.table import merge_sentence

# How the gates are replaced; the first is the default.
METHODS = ("least-squares", "usage", "uniform", "universal")

__all__ = ["METHODS", "merge_sentence"]
