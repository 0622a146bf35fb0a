"""Constants for the token-dependent gates: the simple ways of merging.

The products B_e A_e are averaged, never A and B separately.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantize.merging.experts import Adapter
from quantize.merging.factors import Merge


def constant_gates(adapter: Adapter, method: str, mean_gates: Mapping[str, np.ndarray] | None = None) -> Merge:
    """Every gate replaced by a constant; the universal expert's is always 1.

    Parameters:
        method: `usage`: the mean gate over the calibration tokens; `uniform`: 1/N; `universal`: 0, the baseline that
            drops the specific experts.
        mean_gates: [N] of each layer, for `usage`.
    """
    layers = {}
    for module, experts in adapter.layers.items():
        specific = experts.num_specific
        if method == "universal":
            layers[module] = (experts.a[: experts.rank], experts.b[:, : experts.rank])
            continue
        if method == "uniform":
            gates = np.full(specific, 1 / specific)
        elif method == "usage" and mean_gates is not None:
            gates = mean_gates[module]
        else:
            raise ValueError(f"merge method {method!r} is unknown or lacks its gates")
        weights = np.repeat(np.concatenate([[1.0], gates]), experts.rank).astype(np.float32)
        layers[module] = (experts.a * weights[:, None], experts.b)
    return Merge(method, layers)
