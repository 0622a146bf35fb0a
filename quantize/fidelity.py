"""The gates: a file gets its final name only after it was opened again and compared with the source."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantize import chat, header, probe
from quantize.architectures import TensorPlan, Value
from quantize.child import ChildFailed
from quantize.comparison import TIE, RowsOf, logit_distance, weight_errors
from quantize.reference import Reference
from quantize.tokenizer import Vocabulary

REFERENCE = "F32"
# Mean KL divergence against the float32 file beyond which a file is broken, not merely compressed: ten and
# more times what llama.cpp reports for an 8B model (Q8_0 .0014, Q4_K_M .031), because small models lose more.
_KLD_LIMIT = {"F32": 1e-3, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.03, "Q6_K": 0.1, "Q5_K_M": 0.2}
_KLD_LIMIT_4_BIT = 0.6
# Relative weight error per stored type; twice what Gaussian weights give.
_WEIGHT_LIMIT = {
    "F32": 1e-6,
    "F16": 1e-3,
    "BF16": 5e-3,
    "Q8_0": 0.012,
    "Q6_K": 0.04,
    "Q5_1": 0.08,
    "Q5_0": 0.09,
}
_WEIGHT_LIMIT_5_BIT, _WEIGHT_LIMIT_4_BIT = 0.08, 0.2


@dataclass(frozen=True)
class Gate:
    """One check. `limit` None: measured and reported, not judged. `file`: which quantization it is about."""

    name: str
    file: str
    value: float | str | None
    limit: float | str | None
    passed: bool
    detail: str

    def record(self) -> dict[str, Any]:
        """The gate as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Expected:
    """What every file of the export must hold."""

    metadata: Mapping[str, Value]
    architecture: str
    plans: list[TensorPlan]
    vocabulary: Vocabulary


class Fidelity:
    """Checks files of one export against the Hugging Face reference and against its float32 file."""

    def __init__(self, reference: Reference, expected: Expected, folder: Path) -> None:
        self._reference, self._expected, self._folder = reference, expected, folder

    def check(self, path: Path, quant: str, truth: RowsOf, progress: Callable[[int, int], None]) -> list[Gate]:
        """All gates of one file; a file that cannot even be opened fails its first gate and has no others.

        The float32 file comes first: the others' logits are compared with its. `truth`: the float32 weights.
        """
        try:
            head = header.read(path)
            gates = [self._header(head, quant)]
            answer = self._probe(head, path, quant, progress)
        except (header.Malformed, ChildFailed, chat.TemplateFailed) as error:
            return [Gate("opens", quant, None, "llama.cpp loads it", False, str(error))]
        gates += [self._types(head, quant), self._tokens(answer, quant), self._control(answer, quant)]
        gates += [*self._templates(answer, quant), self._eos(answer, quant), *self._generation(answer, quant)]
        if quant == REFERENCE:
            gates += self._logits("hf", self._reference.folder, quant)
        else:
            gates += self._logits("f32", self._folder / REFERENCE, quant)
            shutil.rmtree(self._folder / quant)  # its logits are as large as the vocabulary is
        return [*gates, self._weights(head, truth, quant)]

    def _probe(
        self, head: header.Header, path: Path, quant: str, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        reference = self._reference
        template = head.metadata.get("tokenizer.chat_template", "")
        folder = self._folder / quant
        folder.mkdir()
        return probe.probe(
            path,
            strings=reference.texts + reference.typed_control,
            segments=[
                chat.segments(template, r.messages, reference.control, answer_next=r.answer_next)
                for r in reference.renderings
            ],
            sequences=reference.sequences,
            prompts=reference.prompts,
            limit=reference.limit,
            folder=folder,
            progress=progress,
        )

    def _header(self, head: header.Header, quant: str) -> Gate:
        problems = []
        if head.metadata.get("general.architecture") != self._expected.architecture:
            problems.append("general.architecture")
        for key, value in self._expected.metadata.items():
            if not _same(head.metadata.get(key), value):
                problems.append(key)
        shapes = {name: tensor.shape for name, tensor in head.tensors.items()}
        if shapes != {plan.name: plan.shape for plan in self._expected.plans}:
            problems.append("tensor names or shapes")
        detail = "wrong: " + ", ".join(problems) if problems else f"{len(shapes)} tensors, {len(head.metadata)} keys"
        return Gate("header", quant, len(problems), 0, not problems, detail)

    def _types(self, head: header.Header, quant: str) -> Gate:
        used = ", ".join(f"{kind}×{count}" for kind, count in head.types().items())
        block = GGML_QUANT_SIZES[GGMLQuantizationType[quant.removesuffix("_M")]][0]
        narrow = sum(len(t.shape) == 2 and t.shape[1] % block != 0 for t in head.tensors.values())
        note = f"; {narrow} matrices fell back, their rows are no multiple of {block}" if narrow else ""
        return Gate("types", quant, used, None, True, used + note)

    def _tokens(self, answer: dict[str, Any], quant: str) -> Gate:
        pairs = zip(self._reference.texts, self._reference.text_ids, answer["strings"], strict=False)
        wrong = [text for text, expected, found in pairs if expected != found]
        detail = f"{len(self._reference.texts)} strings" + (f", first difference: {wrong[0]!r}" if wrong else "")
        return Gate("token_ids", quant, len(wrong), 0, not wrong, detail)

    def _control(self, answer: dict[str, Any], quant: str) -> Gate:
        control = set(self._expected.vocabulary.control.values())
        typed = answer["strings"][len(self._reference.texts) :]
        wrong = sum(bool(control & set(ids)) for ids in typed)
        return Gate(
            "typed_control_text",
            quant,
            wrong,
            0,
            not wrong,
            f"{len(typed)} texts with control tokens typed by a user",
        )

    def _templates(self, answer: dict[str, Any], quant: str) -> list[Gate]:
        renderings = self._reference.renderings
        wrong = sum(r.ids != ids for r, ids in zip(renderings, answer["segments"], strict=True))
        found = iter(answer["segments"])
        broken = 0
        for conversation in self._reference.conversations:
            grown = [next(found) for _ in conversation]
            broken += sum(later[: len(earlier)] != earlier for earlier, later in itertools.pairwise(grown))
        count = len(self._reference.conversations)
        return [
            Gate(
                "chat_template",
                quant,
                wrong,
                0,
                not wrong,
                f"{len(renderings)} renderings of {count} conversations",
            ),
            Gate("append_only", quant, broken, 0, not broken, "each turn extends the tokens of the one before"),
        ]

    def _eos(self, answer: dict[str, Any], quant: str) -> Gate:
        eos = self._expected.vocabulary.eos
        turns = [r.ids for r in self._reference.renderings if not r.answer_next]
        control = set(self._expected.vocabulary.control.values())
        closed = all(next((i for i in reversed(ids) if i in control), None) == eos for ids in turns)
        good = answer["eos"] == eos and answer["eog"] and closed
        name = self._expected.vocabulary.tokens[eos]
        detail = f"id {answer['eos']} ({name}) ends generation: {answer['eog']}, ends each answer: {closed}"
        return Gate("eos", quant, str(good).lower(), "true", good, detail)

    def _generation(self, answer: dict[str, Any], quant: str) -> list[Gate]:
        ends = {self._expected.vocabulary.eos}
        stopped = sum(ids[-1] in ends for ids in answer["generated"])
        expected = sum(ids[-1] in ends for ids in self._reference.generated)
        detail = f"{stopped} of {len(answer['generated'])} greedy answers end by themselves, Hugging Face {expected}"
        if quant != REFERENCE:
            return [Gate("generation_ends", quant, stopped, None, True, detail)]
        compared = zip(self._reference.generated, answer["generated"], self._reference.gaps, strict=True)
        wrong = sum(not _same_answer(hf, own, gaps) for hf, own, gaps in compared)
        return [Gate("generation_ends", quant, wrong, 0, not wrong, detail), self._taught_ends(quant)]

    def _taught_ends(self, quant: str) -> Gate:
        eos = self._expected.vocabulary.eos
        differing, at_end = 0, 0
        for number, position in self._reference.ends.items():
            best = [
                int(np.load(folder / f"logits-{number}.npy", mmap_mode="r")[position - 1].argmax())
                for folder in (self._reference.folder, self._folder / quant)
            ]
            differing += (best[0] == eos) != (best[1] == eos)
            at_end += best[0] == eos
        detail = f"after {len(self._reference.ends)} given answers; Hugging Face ends {at_end} of them there"
        return Gate("eos_after_answer", quant, differing, 0, not differing, detail)

    def _logits(self, name: str, folder: Path, quant: str) -> list[Gate]:
        distance = logit_distance(folder, self._folder / quant, len(self._reference.sequences))
        strict = quant == REFERENCE
        limit = _KLD_LIMIT.get(quant, _KLD_LIMIT_4_BIT)
        detail = f"{distance.positions} positions, {distance.mismatches} differ, {distance.ties} ties within {TIE:g}"
        return [
            Gate(
                f"top1_vs_{name}", quant, round(distance.agreement, 6), 1.0 if strict else None,
                not strict or distance.mismatches == 0, detail,
            ),
            Gate(
                f"kld_vs_{name}", quant, _finite(distance.mean_kld), limit, distance.mean_kld <= limit,
                f"mean in nats; largest {distance.max_kld:.3g}",
            ),
        ]  # fmt: skip

    def _weights(self, head: header.Header, truth: RowsOf, quant: str) -> Gate:
        errors = weight_errors(head, truth)
        ratios = {name: error / _weight_limit(kind) for name, (kind, error) in errors.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        kind, error = errors[worst]
        limit = _weight_limit(kind)
        return Gate("weights", quant, _finite(error), limit, error <= limit, f"worst relative error: {worst} ({kind})")


def _weight_limit(kind: str) -> float:
    if kind in _WEIGHT_LIMIT:
        return _WEIGHT_LIMIT[kind]
    return _WEIGHT_LIMIT_5_BIT if kind.startswith("Q5") else _WEIGHT_LIMIT_4_BIT


def _finite(value: float) -> float | None:
    # JSON knows no infinity; None beside passed=false says it.
    return value if math.isfinite(value) else None


def _same(found: Any, expected: Value) -> bool:
    if isinstance(expected, list):
        return found == len(expected)
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-6)
    return found == expected


def _same_answer(reference: list[int], found: list[int], gaps: list[float]) -> bool:
    """Equal, or parted at a position where the reference itself had a tie."""
    for own, other, gap in zip(found, reference, gaps, strict=False):
        if own != other:
            return gap <= TIE
    return len(found) == len(reference)
