"""The gates: a file gets its final name only after it was opened again and compared with the source."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantize import chat, header, limits, probe, usable
from quantize.architectures import TensorPlan, Value
from quantize.child import ChildFailed
from quantize.comparison import Comparison, LogitDistance, RowsOf, Track, weight_errors
from quantize.own_words import OwnWords
from quantize.reference import Reference, kept_positions
from quantize.vocabulary import Vocabulary

REFERENCE = "F32"
CONTRACT = "pediatricsgpt.contract"
# A file says what was measured of it; the writer keeps this many bytes free under the key.
KEY, RESERVED_BYTES = "pediatricsgpt.fidelity", 512


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
    """What every file must hold. Without `plans`, nobody but the file knows its tensors."""

    metadata: Mapping[str, Value]
    architecture: str
    plans: list[TensorPlan]
    vocabulary: Vocabulary | OwnWords

    @property
    def parameters(self) -> int:
        """How many weights, 0 when unknown."""
        return sum(math.prod(plan.shape) for plan in self.plans)


class Fidelity:
    """Checks the files of one model against the reference, and each other file against the `base` file.

    The base is the unquantized file, of the checkpoint's own type; it is checked first, and held against Hugging
    Face when the reference has its logits. Without a base every file is held against Hugging Face.

    answers: after the checks, the greedy answers of every file beside those they are held against.
    """

    def __init__(
        self,
        reference: Reference,
        expected: Expected,
        folder: Path,
        *,
        base: str | None = REFERENCE,
        parameters: int | None = None,
        exact: bool = False,
        other: str = "hf",
    ) -> None:
        """
        folder: for what is only needed meanwhile.
        exact: the truth is what the base was written from, bit by bit, so that a single changed bit fails (not so
            when something was merged in).
        other: the name of what the reference's track is of.
        """
        self._reference, self._expected, self._folder = reference, expected, folder
        self._control_ids = set(expected.vocabulary.control.values())
        self._base, self._exact, self._other = base, exact, other
        self._parameters = expected.parameters if parameters is None else parameters
        self._track: Track | None = None
        self._base_answer: probe.Answer | None = None
        self._summaries: dict[str, dict[str, Any]] = {}
        self.answers: list[dict[str, Any]] = []

    def check(self, path: Path, quant: str, truth: RowsOf | None, progress: Callable[[int, int], None]) -> list[Gate]:
        """All gates of one file; a file that cannot even be opened fails its first gate and has no others.

        `truth`: the weights it was made of, float32 rows by GGUF name; None at level `quick`.
        """
        try:
            head = header.read(path)
            usable.check(head)
            gates = [self._header(head, quant)]
            compared = self._compared(quant, len(head.metadata["tokenizer.ggml.tokens"]))
            answer = self._probe(head, path, quant, compared, progress)
        except (header.Malformed, ChildFailed, chat.TemplateFailed, ValueError) as error:
            return [Gate("opens", quant, None, "llama.cpp loads it", False, str(error))]
        gates += [self._types(head, quant), self._tokens(answer, quant), self._typed(answer, quant)]
        gates += [*self._templates(answer, quant, head), self._eos(answer, quant)]
        if self._reference.prompts:
            gates += self._generation(answer, quant)
        if isinstance(compared, Comparison):
            gates += self._logits(compared.result(), quant)
            gates += self._taught_ends(compared, quant)
        if truth is not None:
            gates += self._weights(head, truth, quant)
        if quant == self._base:
            self._base_answer = answer
        return gates

    def distance(self, path: Path, quant: str, progress: Callable[[int, int], None]) -> float | None:
        """Mean KL divergence in nats of a file from the base, nothing else; None below level `file`."""
        compared = self._compared(quant, 0)
        if not isinstance(compared, Comparison):
            return None
        request = probe.Request(sequences=[ids.tolist() for ids in compared.tested.sequences])
        folder = self._folder / f"probe-{quant}"
        folder.mkdir(exist_ok=True)
        probe.probe(path, request, folder, progress, compared.add)
        return compared.result().mean_kld

    def summary(self, quant: str) -> str:
        """The measured figures as compact JSON of at most RESERVED_BYTES, for the file's own metadata."""
        return json.dumps(self._summaries.get(quant, {"level": self._reference.level}), separators=(",", ":"))

    def _compared(self, quant: str, vocabulary: int) -> Comparison | Track | None:
        """What takes the logits of a file: a comparison, or, for a base without Hugging Face, a new track."""
        reference = self._reference
        if not reference.sequences:
            return None
        if quant == self._base:
            folder = self._folder / "base"
            folder.mkdir()
            self._track = Track(reference.sequences[: reference.measured], folder, kept_positions(vocabulary))
            return Comparison(reference.track, limits.tie(quant)) if reference.track else self._track
        if self._track is not None:
            return Comparison(self._track, 0.0)
        return Comparison(reference.track.first(reference.measured), 0.0) if reference.track else None

    def _probe(
        self,
        head: header.Header,
        path: Path,
        quant: str,
        compared: Comparison | Track | None,
        progress: Callable[[int, int], None],
    ) -> probe.Answer:
        reference, base = self._reference, self._track if quant == self._base else None
        template = head.metadata.get("tokenizer.chat_template", "")
        folder = self._folder / f"probe-{quant}"
        folder.mkdir(exist_ok=True)

        def block(number: int, start: int, logits: Any) -> None:
            if compared is not None:
                compared.add(number, start, logits)
            if base is not None and base is not compared and number < reference.measured:
                base.add(number, start, logits)

        sequences = [] if compared is None else reference.sequences
        if isinstance(compared, Comparison):
            sequences = [ids.tolist() for ids in compared.tested.sequences]
        request = probe.Request(
            strings=reference.texts + reference.typed_control,
            segments=[
                chat.segments(template, r.messages, reference.control, answer_next=r.answer_next)
                for r in reference.renderings
            ],
            sequences=sequences,
            prompts=reference.prompts,
            limit=reference.limit,
        )
        return probe.probe(path, request, folder, progress, block)

    def _header(self, head: header.Header, quant: str) -> Gate:
        problems = []
        if head.architecture != self._expected.architecture:
            problems.append("general.architecture")
        for key, value in self._expected.metadata.items():
            if key != KEY and not _same(head.metadata.get(key), value):
                problems.append(key)
        shapes = {name: tensor.shape for name, tensor in head.tensors.items()}
        plans = self._expected.plans
        if plans and shapes != {plan.name: plan.shape for plan in plans}:
            problems.append("tensor names or shapes")
        detail = "wrong: " + ", ".join(problems) if problems else f"{len(shapes)} tensors, {len(head.metadata)} keys"
        return Gate("header", quant, len(problems), 0, not problems, detail)

    def _types(self, head: header.Header, quant: str) -> Gate:
        used = ", ".join(f"{kind}×{count}" for kind, count in head.types().items())
        block = _block(quant)
        narrow = sum(len(t.shape) == 2 and t.shape[1] % block != 0 for t in head.tensors.values())
        note = f"; {narrow} matrices fell back, their rows are no multiple of {block}" if narrow else ""
        return Gate("types", quant, used, None, True, used + note)

    def _tokens(self, answer: probe.Answer, quant: str) -> Gate:
        texts, expected = self._reference.texts, self._reference.text_ids
        if expected is None:
            # SentencePiece vocabularies put a space before every text.
            pairs = zip(texts, answer.restored[: len(texts)], strict=True)
            wrong = [text for text, found in pairs if found not in (text, " " + text)]
            name, detail = "text_restored", f"{len(texts)} strings tokenised and put together again"
        else:
            pairs = zip(texts, expected, answer.strings[: len(texts)], strict=True)
            wrong = [text for text, ids, found in pairs if ids != found]
            name, detail = "token_ids", f"{len(texts)} strings"
        detail += f", first difference: {wrong[0]!r}" if wrong else ""
        return Gate(name, quant, len(wrong), 0, not wrong, detail)

    def _typed(self, answer: probe.Answer, quant: str) -> Gate:
        typed = answer.strings[len(self._reference.texts) :]
        wrong = sum(bool(self._control_ids & set(ids)) for ids in typed)
        detail = f"{len(typed)} texts with control tokens typed by a user"
        return Gate("typed_control_text", quant, wrong, 0, not wrong, detail)

    def _templates(self, answer: probe.Answer, quant: str, head: header.Header) -> list[Gate]:
        renderings, count = self._reference.renderings, len(self._reference.conversations)
        wrong = sum(r.ids != ids for r, ids in zip(renderings, answer.segments, strict=True))
        found = iter(answer.segments)
        broken = 0
        for conversation in self._reference.conversations:
            grown = [next(found) for _ in conversation]
            broken += sum(later[: len(earlier)] != earlier for earlier, later in itertools.pairwise(grown))
        # Ids that came from this very file agree with themselves.
        known = self._reference.text_ids is not None
        # Ours must not; a foreign one may (Qwen3's drops the empty thoughts of earlier turns), and costs time only.
        ours = CONTRACT in head.metadata
        return [
            Gate(
                "chat_template", quant, wrong, 0 if known else None, not wrong,
                f"{len(renderings)} renderings of {count} conversations",
            ),
            Gate(
                "append_only", quant, broken, 0 if ours else None, not (ours and broken),
                f"turns that do not extend the tokens of the one before, of {len(renderings)}; the app reads them anew",
            ),
        ]  # fmt: skip

    def _eos(self, answer: probe.Answer, quant: str) -> Gate:
        eos = self._expected.vocabulary.eos
        control = self._control_ids
        turns = [r.ids for r in self._reference.renderings if not r.answer_next]
        closed = all(next((i for i in reversed(ids) if i in control), None) == eos for ids in turns)
        good = answer.eos == eos and answer.eog and closed
        name = self._expected.vocabulary.tokens[eos]
        detail = f"id {answer.eos} ({name}) ends generation: {answer.eog}, ends each answer: {closed}"
        return Gate("eos", quant, str(good).lower(), "true", good, detail)

    def _generation(self, answer: probe.Answer, quant: str) -> list[Gate]:
        reference, base = self._reference, self._base_answer
        ids, texts = reference.generated, reference.answers
        other = "Hugging Face" if self._other == "hf" else self._other
        if base is not None:
            ids, texts, other = base.generated, base.texts, str(self._base)
        self._side_by_side(answer, quant, ids, texts, other)
        stopped = sum(answer.ended)
        detail = f"{stopped} of {len(answer.generated)} greedy answers end by themselves"
        ends = {self._expected.vocabulary.eos}
        if ids is not None:
            detail += f", {other} {sum(base.ended) if base else sum(one[-1] in ends for one in ids)}"
        if quant != self._base or reference.generated is None or reference.gaps is None:
            return [Gate("generation_ends", quant, stopped, None, True, detail)]
        compared = zip(reference.generated, answer.generated, reference.gaps, answer.ended, strict=True)
        wrong = sum(not _same_answer(hf, own, gaps, limits.tie(quant), ended) for hf, own, gaps, ended in compared)
        detail += f"; {wrong} answers differ"
        expected = sum(one[-1] in ends for one in reference.generated)
        return [Gate("generation_ends", quant, stopped, expected, not wrong, detail)]

    def _side_by_side(
        self, answer: probe.Answer, quant: str, ids: list[list[int]] | None, texts: list[str] | None, other: str
    ) -> None:
        for number, question in enumerate(self._reference.questions):
            record = {
                "file": quant,
                "question": question,
                "answer": answer.texts[number],
                "tokens": len(answer.generated[number]),
                "stop": "end" if answer.ended[number] else "limit",
            }
            if ids is not None and texts is not None:
                pairs = zip(ids[number], answer.generated[number], strict=False)
                common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                record |= {"against": other, "its_answer": texts[number], "common_tokens": common}
            self.answers.append(record)

    def _taught_ends(self, compared: Comparison, quant: str) -> list[Gate]:
        """Whether the base says the end of an answer where Hugging Face says it, after answers that were given."""
        truth, eos = self._reference.track, self._expected.vocabulary.eos
        if quant != self._base or truth is None:
            return []
        differing = at_end = asked = 0
        for number, position in self._reference.ends.items():
            logits = truth.logits(number, position - 1, position)
            if logits is None:
                continue
            asked += 1
            best, own = int(truth.best[number][position - 1]), int(compared.tested.best[number][position - 1])
            tied = float(logits[0, best] - logits[0, own]) <= limits.tie(quant)
            differing += ((best == eos) != (own == eos)) and not tied
            at_end += best == eos
        detail = f"after {asked} given answers; Hugging Face ends {at_end} of them there"
        return [Gate("eos_after_answer", quant, differing, 0, not differing, detail)]

    def _logits(self, found: LogitDistance, quant: str) -> list[Gate]:
        against = self._other if quant == self._base or self._track is None else str(self._base).lower()
        strict = quant == self._base
        # A base of 16 bits has rounding of its own, which no file held against it can be without.
        both = {quant} if self._track is None or self._base is None else {quant, self._base}
        kld = max(limits.kld(name, self._parameters) for name in both)
        ratio = max(limits.perplexity(name, self._parameters) for name in both)
        tail = max(limits.kld_99(name, self._parameters) for name in both)
        same = min(limits.agreement(name, self._parameters) for name in both)
        tie = f", {found.ties} ties within {limits.tie(quant):g}" if strict else ""
        self._summaries[quant] = {
            "level": self._reference.level,
            "against": against,
            "tokens": found.positions,
            **{
                name: float(f"{value:.4g}")
                for name, value in (
                    ("kld", found.mean_kld),
                    ("kld_99", found.kld_99),
                    ("top1", found.agreement),
                    ("perplexity_ratio", found.perplexity_ratio),
                )
                if math.isfinite(value)
            },
        }
        return [
            Gate(
                f"top1_vs_{against}", quant, round(found.agreement, 6), 1.0 if strict else round(same, 4),
                found.mismatches == 0 if strict else found.agreement >= same,
                f"{found.positions} positions, {found.mismatches} differ{tie}",
            ),
            Gate(
                f"kld_vs_{against}", quant, _finite(found.mean_kld), kld, found.mean_kld <= kld,
                f"mean in nats; median {found.median_kld:.3g}, largest {found.max_kld:.3g}",
            ),
            Gate(
                f"kld99_vs_{against}", quant, _finite(found.kld_99), tail, found.kld_99 <= tail,
                "in nats; one position in a hundred is farther away",
            ),
            Gate(
                f"dp_vs_{against}", quant, _finite(found.rms_dp), None, True,
                "root mean square change of the probability of the token that follows",
            ),
            Gate(
                f"perplexity_vs_{against}", quant, _finite(found.perplexity_ratio), ratio,
                found.perplexity_ratio <= ratio,
                f"{found.perplexity[1]:.4g} : {found.perplexity[0]:.4g} on held-out text",
            ),
        ]  # fmt: skip

    def _weights(self, head: header.Header, truth: RowsOf, quant: str) -> list[Gate]:
        errors = weight_errors(head, truth)
        ratios = {name: error.relative / limits.weight_error(error.kind) for name, error in errors.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        kind, error = errors[worst].kind, errors[worst].relative
        limit = limits.weight_error(kind)
        gates = [
            Gate("weights", quant, _finite(error), limit, error <= limit, f"worst relative error: {worst} ({kind})")
        ]
        if self._exact:
            changed = {name: error.changed for name, error in errors.items() if error.changed}
            detail = f"first: {next(iter(changed))}" if changed else "every unquantized value is the source's, rounded"
            gates.append(Gate("weight_bits", quant, sum(changed.values()), 0, not changed, detail))
        return gates


def _block(quant: str) -> int:
    """Elements per block of the type a mixture is named for: 256 for K- and most IQ-types."""
    name = quant
    while name not in GGMLQuantizationType.__members__ and "_" in name:
        name = name.rpartition("_")[0]
    kind = GGMLQuantizationType.__members__.get(name)
    return GGML_QUANT_SIZES[kind][0] if kind is not None else 1


def _finite(value: float) -> float | None:
    # JSON knows no infinity; None beside passed=false says it.
    return value if math.isfinite(value) else None


def _same(found: Any, expected: Value) -> bool:
    if isinstance(expected, list):
        if not isinstance(found, header.Array) or len(found) != len(expected):
            return False
        if found.kind == header.F32:
            return np.allclose(np.frombuffer(found.data, np.float32), np.array(expected, np.float32), rtol=1e-6)
        return found.list() == expected
    if isinstance(expected, float):
        return isinstance(found, float) and math.isclose(found, expected, rel_tol=1e-6)
    return found == expected


def _same_answer(reference: list[int], found: list[int], gaps: list[float], tie: float, ended: bool) -> bool:
    """Equal, or parted at a position where the reference itself had a tie.

    llama.cpp also ends at other tokens that look like an end (<|endoftext|>), where Hugging Face goes on.
    """
    for own, other, gap in zip(found, reference, gaps, strict=False):
        if own != other:
            return gap <= tie
    return len(found) == len(reference) or (ended and len(found) < len(reference))
