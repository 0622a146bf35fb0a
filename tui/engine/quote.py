"""Quote mode: a grammar whose only words are reviewed sentences, a few fixed phrases, and the end.

In every state the grammar offers *pieces* (token lists with prior weights). The pieces on offer form a token trie.
Where it branches, a child's score is the log-softmax over the allowed tokens of the model's logits plus the weighted
logarithm of the child's share of the prior mass; the best child is taken. Where it does not branch, the tokens are
forced and need no look at the model. So whatever the model says, only whole pieces come out.

No import of llama.cpp and none of numpy: logits are anything that can be indexed by token id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


class Logits(Protocol):
    """Anything that gives a number for a token id."""

    def __getitem__(self, token: int, /) -> Any:
        """The logit of a token."""
        ...


@dataclass(frozen=True)
class QuoteWeights:
    """Prior masses and how much they count; to be tuned on a development set."""

    prior: float = 1.0  # factor of the log prior beside the log-softmax of the model
    # A passage's share of the cites is exp(card / card_temperature + section / section_temperature), normalised: the
    # search knows better which illness is meant, the model which section is asked for.
    card_temperature: float = 0.01
    section_temperature: float = 0.1
    certainty: float = 4.0  # exponent that sharpens the search's confidence of being in scope
    opening: float = 0.05  # mass of the openings; cites and refusal together have 1
    identity: float = 4.0  # mass of the identity phrase, where it is offered
    another: float = 0.02  # mass of citing another passage; the sentences of this one have 1
    closing: float = 0.1  # mass of the closings after one sentence; grows with every further sentence
    end: float = 0.3  # mass of the end, likewise
    follow: float = 2.0  # factor for the sentence that follows the last one in its passage
    sentences: int = 8  # most sentences in an answer


@dataclass(frozen=True)
class QuotePassage:
    """What may be quoted of one passage: its cite phrase, its sentences (lines), and their prior weights."""

    cite: str
    weight: float
    sentences: tuple[str, ...]
    sentence_weights: tuple[float, ...]


@dataclass(frozen=True)
class QuoteSpec:
    """Everything one answer may be made of; every text ends with a newline."""

    passages: tuple[QuotePassage, ...]
    refusal: str
    refusal_weight: float  # cites have 1 - refusal_weight, divided by their weights
    openings: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    identity: str | None = None  # offered only where the question asks who answers
    weights: QuoteWeights = field(default_factory=QuoteWeights)

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> QuoteSpec:
        """Inverse of dataclasses.asdict after a trip through JSON."""
        passages = tuple(
            QuotePassage(p["cite"], p["weight"], tuple(p["sentences"]), tuple(p["sentence_weights"]))
            for p in raw["passages"]
        )
        lists = {name: tuple(raw[name]) for name in ("openings", "closings")}
        return cls(**{**raw, **lists, "passages": passages, "weights": QuoteWeights(**raw["weights"])})


Kind = Literal["opening", "cite", "sentence", "closing", "refusal", "identity", "end"]


@dataclass(frozen=True)
class Piece:
    """One thing that may come next: `index` counts from 0 (for a sentence, within its passage)."""

    kind: Kind
    tokens: tuple[int, ...]
    weight: float
    index: int = 0
    passage: int = -1


@dataclass(frozen=True)
class State:
    """Where an answer stands; `used` are the texts of the sentences already quoted."""

    phase: Literal["start", "opened", "passage", "closed", "ended"] = "start"
    passage: int = -1
    last: int = -1  # index of the last sentence quoted in this passage
    count: int = 0  # sentences quoted in all
    here: int = 0  # sentences quoted since the last cite
    used: frozenset[str] = frozenset()


class Grammar:
    """The quote grammar of one answer; immutable, states are values."""

    def __init__(self, spec: QuoteSpec, tokenise: Any, end: int) -> None:
        """`tokenise` turns a text into token ids without control tokens; `end` is the end-of-turn id."""
        self._spec = spec
        self._end = (end,)
        texts = [spec.refusal, *spec.openings, *spec.closings, *([spec.identity] if spec.identity else [])]
        for passage in spec.passages:
            texts += [passage.cite, *passage.sentences]
        self._tokens: dict[str, tuple[int, ...]] = {text: tuple(tokenise(text)) for text in texts}

    def offers(self, state: State, room: int) -> tuple[list[Piece], bool]:
        """The pieces that may come next and fit into `room` tokens (the end always fits), and whether all do."""
        pieces = {
            "start": self._start,
            "opened": self._start,
            "passage": self._in_passage,
            "closed": lambda _state: [],
            "ended": lambda _state: [],
        }[state.phase](state)
        possible = [piece for piece in pieces if piece.tokens and piece.weight > 0]
        pieces = [piece for piece in possible if len(piece.tokens) < room]
        all_fit = len(pieces) == len(possible)
        may_end = state.phase == "closed" or (state.phase == "passage" and state.here > 0)
        if state.phase != "ended" and (may_end or not pieces):
            pieces.append(Piece("end", self._end, self._spec.weights.end * max(1, state.count)))
        return pieces, all_fit

    def advance(self, state: State, piece: Piece) -> State:
        """The state after a whole piece."""
        match piece.kind:
            case "opening":
                return State("opened")
            case "cite":
                return State("passage", piece.passage, -1, state.count, 0, state.used)
            case "sentence":
                used = state.used | {self._spec.passages[piece.passage].sentences[piece.index]}
                return State("passage", piece.passage, piece.index, state.count + 1, state.here + 1, used)
            case "closing" | "refusal" | "identity":
                return State("closed", count=state.count, used=state.used)
            case _:
                return State("ended", count=state.count, used=state.used)

    def _start(self, state: State) -> list[Piece]:
        spec, weights = self._spec, self._spec.weights
        pieces = self._cites(1.0 - spec.refusal_weight, state)
        pieces.append(Piece("refusal", self._tokens[spec.refusal], max(spec.refusal_weight, 1e-6)))
        if spec.identity:
            pieces.append(Piece("identity", self._tokens[spec.identity], weights.identity))
        if state.phase == "start":
            # An opening leads to an answer: it is as likely as one.
            mass = weights.opening * (1.0 - spec.refusal_weight) / max(1, len(spec.openings))
            pieces += [Piece("opening", self._tokens[t], mass, i) for i, t in enumerate(spec.openings)]
        return pieces

    def _in_passage(self, state: State) -> list[Piece]:
        spec, weights = self._spec, self._spec.weights
        pieces = [] if state.count >= weights.sentences else self._sentences(state)
        if state.here > 0:
            if state.count < weights.sentences:
                pieces += self._cites(weights.another, state, but=state.passage)
            mass = weights.closing * state.count / max(1, len(spec.closings))
            pieces += [Piece("closing", self._tokens[t], mass, i) for i, t in enumerate(spec.closings)]
        return pieces

    def _sentences(self, state: State) -> list[Piece]:
        passage = self._spec.passages[state.passage]
        free = [i for i, text in enumerate(passage.sentences) if text not in state.used]
        mass = {
            i: passage.sentence_weights[i] * (self._spec.weights.follow if i == state.last + 1 else 1.0) for i in free
        }
        total = sum(mass.values()) or 1.0
        return [Piece("sentence", self._tokens[passage.sentences[i]], mass[i] / total, i, state.passage) for i in free]

    def _cites(self, mass: float, state: State, but: int = -1) -> list[Piece]:
        """Cites of the passages that still have an unused sentence, sharing `mass` by their weights."""
        open_ = [
            (i, passage)
            for i, passage in enumerate(self._spec.passages)
            if i != but and any(text not in state.used for text in passage.sentences)
        ]
        total = sum(passage.weight for _, passage in open_) or 1.0
        return [
            Piece("cite", self._tokens[passage.cite], max(mass, 1e-6) * passage.weight / total, passage=i)
            for i, passage in open_
        ]


class Walk:
    """A walk through the token trie of the pieces on offer, from the root to one piece."""

    def __init__(self, pieces: Sequence[Piece], prior: float) -> None:
        self._left = list(pieces)
        self._depth = 0
        self._prior = prior

    @property
    def piece(self) -> Piece | None:
        """The piece walked to, None while it is open. Where one piece begins another, the shorter wins."""
        return next((piece for piece in self._left if len(piece.tokens) == self._depth), None)

    def forced(self) -> list[int]:
        """Tokens that all pieces left share from here (possibly none); moves past them."""
        start = self._depth
        while self.piece is None and len({piece.tokens[self._depth] for piece in self._left}) == 1:
            self._depth += 1
        return list(self._left[0].tokens[start : self._depth])

    def choose(self, logits: Logits) -> int:
        """Choose the next token where the pieces branch; deterministic (ties: the lowest id)."""
        mass: dict[int, float] = {}
        for piece in self._left:
            token = piece.tokens[self._depth]
            mass[token] = mass.get(token, 0.0) + piece.weight
        scores = scored(logits, mass, self._prior)
        token = min(scores, key=lambda candidate: (-scores[candidate], candidate))
        self._left = [piece for piece in self._left if piece.tokens[self._depth] == token]
        self._depth += 1
        return token


def scored(logits: Logits, mass: Mapping[int, float], prior: float) -> dict[int, float]:
    """Score of each allowed token: log-softmax over the allowed ones + prior * log(share of the mass).

    A logit that is not a number counts as impossible (a broken model must not break the grammar).
    """
    values = {token: float(logits[token]) for token in mass}
    values = {token: -math.inf if math.isnan(value) else value for token, value in values.items()}
    top = max(values.values())
    if math.isinf(top):
        values, top = dict.fromkeys(values, 0.0), 0.0
    norm = top + math.log(sum(math.exp(value - top) for value in values.values()))
    total = sum(mass.values())
    return {token: values[token] - norm + prior * math.log(mass[token] / total) for token in mass}
