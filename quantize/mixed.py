"""K- and IQ-files of one export: made with an importance matrix, without one, or with the closer of both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantize import quantizer
from quantize.fidelity import Fidelity
from quantize.importance import for_tensors
from quantize.prepare import Prepared
from quantize.progress import Progress, labelled
from quantize.sizes import MIXTURES, NEED_IMATRIX
from quantize.study import Studied


class Mixed:
    """llama.cpp's quantizer with what this export knows: importance, overrides, and which of two files is closer."""

    def __init__(
        self,
        mode: str,
        overrides: Mapping[str, str],
        prepared: Prepared,
        studied: Studied,
        fidelity: Fidelity,
        work: Path,
        progress: Progress,
    ) -> None:
        """`mode`: auto, on or off."""
        self._mode, self._overrides, self._fidelity = mode, overrides, fidelity
        self._work, self._progress = work, progress
        self._matrix: dict[str, np.ndarray] = {}
        self._recorded: dict[str, str | int] = {}
        # What is told of it: text, tokens, and per type the mean KLD with and without.
        self.record: dict[str, Any] | None = None
        if studied.importance is not None:
            self._matrix = for_tensors(studied.importance, prepared.plans)
            self._recorded = studied.importance.record(studied.importance_text)
            self.record = {
                "text": studied.importance_text,
                "sequences": studied.importance.sequences,
                "tokens": studied.importance.tokens,
                "mean_kld": {},
            }

    def make(self, source: Path, target: Path, quant: str) -> None:
        """Writes `target` from the unquantized `source`. Raises BadInput with llama.cpp's reason."""
        if not self._matrix:
            self._quantize(source, target, quant, f"Quantizing {quant}", plain=True)
            return
        self._quantize(source, target, quant, f"Quantizing {quant}", plain=False)
        if self._mode != "auto" or MIXTURES[quant][1] in NEED_IMATRIX:
            self._note(quant, used=True)
            return
        other = target.with_suffix(".plain.part")
        self._quantize(source, other, quant, f"Quantizing {quant} without importance", plain=True)
        weighted = self._fidelity.distance(target, quant, labelled(self._progress, f"Comparing {quant}"))
        plain = self._fidelity.distance(other, quant, labelled(self._progress, f"Comparing {quant} without importance"))
        used = weighted is None or plain is None or weighted <= plain
        if not used:
            os.replace(other, target)
        other.unlink(missing_ok=True)
        self._note(quant, used=used, weighted=weighted, plain=plain)

    def _quantize(self, source: Path, target: Path, quant: str, label: str, *, plain: bool) -> None:
        quantizer.quantize(
            source, target, quant, self._work, labelled(self._progress, label), overrides=self._overrides,
            imatrix=None if plain else self._matrix, recorded=None if plain else self._recorded,
        )  # fmt: skip

    def _note(self, quant: str, *, used: bool, weighted: float | None = None, plain: float | None = None) -> None:
        assert self.record is not None
        self.record["mean_kld"][quant] = {"used": used, "with": weighted, "without": plain}
