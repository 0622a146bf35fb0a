"""What a merge is: two thin matrices per layer that stand for its experts and routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

# A [k, in] and B [out, k], float32; the layer's weight gains B·A.
Factors = tuple[np.ndarray, np.ndarray]


class Merge:
    """``W + B A`` per layer, the adapter's scaling folded into B."""

    def __init__(self, method: str, layers: Mapping[str, Factors]) -> None:
        self.method = method
        self._layers = dict(layers)

    def __iter__(self) -> Iterator[str]:
        """The names of the layers, as in the checkpoint (`model.layers.0.mlp.gate_proj`)."""
        return iter(self._layers)

    def factors(self, module: str) -> Factors:
        """A [k, in] and B [out, k] of one layer."""
        return self._layers[module]

    def delta_rows(self, module: str, rows: slice | np.ndarray) -> np.ndarray | None:
        """Rows of what the experts add to a layer's weight, float32 [rows, in]; None for a layer without experts."""
        if module not in self._layers:
            return None
        a, b = self._layers[module]
        return b[rows] @ a


def difference(wanted: Merge, present: Merge) -> Merge:
    """What must be added to a model that has `present` folded in, so that it becomes `wanted`.

    With B shared (both made from the same experts) the rank stays; else the ranks add up.
    """
    layers = {}
    for module in wanted:
        (a, b), (a_present, b_present) = wanted.factors(module), present.factors(module)
        if np.array_equal(b, b_present):
            layers[module] = (a - a_present, b)
        else:
            layers[module] = (np.concatenate([a, a_present]), np.concatenate([b, -b_present], axis=1))
    return Merge(wanted.method, layers)
