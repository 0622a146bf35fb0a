"""One conversation with a loaded model: prompt, prefix reuse, quoting or free generation, as a stream of events.

Events are plain dictionaries (they cross a pipe as JSON): `reading` {done, total}, `delta` {text, tokens},
`finished` {text, stop_reason, error, pieces, tokens, prompt_tokens, reused_tokens, decode_calls, dropped_turns,
seconds, first_token_seconds}.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tui.engine.contract import EngineError
from tui.engine.llama import Model, Stopped
from tui.engine.prompt import ChatTemplate, Message
from tui.engine.quote import Grammar, Piece, QuoteSpec, State, Walk

MAX_NEW_TOKENS = 512
_SHORTEST_LOOP = 16  # tokens that must repeat before it counts as a loop
_LONGEST_PERIOD = 80  # tokens


class ContextFull(EngineError):
    """The question and its passages alone do not fit into the context."""


Emit = Callable[[dict[str, Any]], None]


class Session:
    """A model, its template, and the answers it has given (so that their exact tokens are found in the cache)."""

    def __init__(self, model: Model, template: str, sampling: Mapping[str, float]) -> None:
        self._model = model
        self._template = ChatTemplate(template, model)
        self._sampling = sampling
        self._answers: dict[str, tuple[int, ...]] = {}

    @property
    def folds_system(self) -> bool:
        """Whether the template takes no system message, so that the first user message carries it."""
        return self._template.folds_system

    def generate(self, request: Mapping[str, Any], emit: Emit) -> None:
        """Answer a request {messages, quote | None, max_tokens, sampling, seed}; the last event is `finished`.

        `quote` is a QuoteSpec as a dictionary; without it the model writes freely.
        """
        turn = _Turn(self._model, emit)
        limit = int(request.get("max_tokens") or MAX_NEW_TOKENS)
        messages = list(request["messages"])
        try:
            tokens = self._fit(messages, limit, turn)
            quote = request.get("quote")
            if quote:
                spec = QuoteSpec.of_json(quote)
                grammar = Grammar(spec, self._model.tokenise, self._model.end)
                turn.stop_reason = self._quote(turn, tokens, grammar, spec.weights.prior)
            else:
                choose = self._model.sampler(request.get("sampling", self._sampling), request.get("seed"))
                turn.stop_reason = self._write(turn, tokens, choose, limit)
        except Stopped:
            turn.stop_reason = "stopped"
        except ContextFull as error:
            turn.stop_reason, turn.error = "context", str(error)
        except EngineError as error:
            turn.stop_reason, turn.error = "error", str(error)
        self._remember(messages, turn)
        turn.finish()

    def _fit(self, messages: list[Mapping[str, str]], limit: int, turn: _Turn) -> list[int]:
        """Tokens of the prompt; drops the oldest whole turns until it and an answer fit into the context."""
        room = self._model.context - min(limit, self._model.context // 4)
        while True:
            tokens = self._template.tokens([Message(m["role"], m["content"], self._known(m)) for m in messages])
            turn.prompt_tokens = len(tokens)
            if len(tokens) <= room:
                return tokens
            first = 1 if messages[0]["role"] == "system" else 0
            if len(messages) - first < 3:
                raise ContextFull(
                    f"问题和资料太长（{len(tokens)} 个词元，上限 {room}），请缩短问题，或用更大的上下文。"
                )
            del messages[first : first + 2]
            turn.dropped_turns += 1

    def _known(self, message: Mapping[str, str]) -> tuple[int, ...] | None:
        return self._answers.get(message["content"]) if message["role"] == "assistant" else None

    def _remember(self, messages: Sequence[Mapping[str, str]], turn: _Turn) -> None:
        """Keep the tokens of this answer and of those still in the conversation."""
        alive = {message["content"] for message in messages}
        self._answers = {text: tokens for text, tokens in self._answers.items() if text in alive}
        if turn.text:
            self._answers[turn.text] = tuple(turn.shown_tokens)

    def _quote(self, turn: _Turn, prompt: list[int], grammar: Grammar, prior: float) -> str:
        state, whole = State(), True
        while state.phase != "ended":
            pieces, all_fit = grammar.offers(state, self._model.context - turn.length - len(prompt))
            whole = whole and all_fit
            walk = Walk(pieces, prior)
            while walk.piece is None:
                turn.take(walk.forced())
                if walk.piece is None:
                    turn.read(prompt)
                    turn.take([walk.choose(self._model.logits())])
            state = grammar.advance(state, walk.piece)
            turn.pieces.append(walk.piece)
            if state.phase != "ended":
                turn.show()
        # An answer that could not choose freely, or that announces a passage and quotes nothing, was cut.
        kinds = [piece.kind for piece in turn.pieces]
        quoted = all(after == "sentence" for kind, after in pairwise(kinds) if kind == "cite")
        return "eos" if whole and quoted else "context"

    def _write(self, turn: _Turn, prompt: list[int], choose: Callable[[], int], limit: int) -> str:
        while True:
            turn.read(prompt)
            token = choose()
            if self._model.ends(token):
                return "eos"
            turn.take([token])
            turn.show()
            if turn.length + len(prompt) >= self._model.context:
                return "context"
            if turn.length >= limit or is_loop(turn.tokens):
                return "length"


class _Turn:
    """The state of one answer: its tokens, how many of them are evaluated and shown, and the clock."""

    def __init__(self, model: Model, emit: Emit) -> None:
        self._model, self._emit = model, emit
        self._start = time.perf_counter()
        self._calls = model.decode_calls
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._evaluated = 0  # of tokens
        self._shown = 0  # of tokens
        self._prompt_read = False
        self.first: float | None = None
        self.tokens: list[int] = []
        self.text = ""
        self.pieces: list[Piece] = []
        self.stop_reason = "error"
        self.prompt_tokens = self.reused = self.dropped_turns = 0
        self.error: str | None = None

    @property
    def length(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens)

    @property
    def shown_tokens(self) -> list[int]:
        """The tokens of the text: without the end and without a piece that was stopped half way."""
        return self.tokens[: self._shown]

    def take(self, tokens: Sequence[int]) -> None:
        """Add decided tokens; they are evaluated with the next `read`."""
        self.tokens += tokens

    def read(self, prompt: Sequence[int]) -> None:
        """Evaluate the prompt (once) and all decided tokens in as few batches as possible; raises Stopped."""
        fresh = self.tokens[self._evaluated :]
        if self._prompt_read:
            self._model.extend(fresh)
        else:
            self.reused = self._model.rewind(prompt)
            rest = [*prompt[self.reused :], *fresh]
            total = len(prompt) - self.reused
            self._emit({"event": "reading", "done": 0, "total": total})
            self._model.extend(
                rest, lambda done: self._emit({"event": "reading", "done": min(done, total), "total": total})
            )
            self._prompt_read = True
        self._evaluated = self.length

    def show(self) -> None:
        """Emit the text of the tokens not shown yet; a character split over tokens waits for its last byte."""
        fresh = b"".join(map(self._model.piece, self.tokens[self._shown :]))
        self._shown = self.length
        if self.first is None:
            self.first = time.perf_counter() - self._start
        if text := self._decoder.decode(fresh):
            self.text += text
            self._emit({"event": "delta", "text": text, "tokens": self._shown})

    def finish(self) -> None:
        """Emit `finished`. Bytes of a character that was never completed are not shown."""
        seconds = time.perf_counter() - self._start
        self._emit(
            {
                "event": "finished",
                "text": self.text,
                "stop_reason": self.stop_reason,
                "error": self.error,
                "pieces": [[piece.kind, piece.passage, piece.index] for piece in self.pieces],
                "tokens": self._shown,
                "prompt_tokens": self.prompt_tokens,
                "reused_tokens": self.reused,
                "decode_calls": self._model.decode_calls - self._calls,
                "dropped_turns": self.dropped_turns,
                "seconds": seconds,
                "first_token_seconds": seconds if self.first is None else self.first,
            }
        )


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether the end of a token list repeats itself at least three times over at least 16 tokens."""
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // 3) + 1):
        need = max(3 * period, _SHORTEST_LOOP)
        if need <= len(tokens) and all(tokens[-i] == tokens[-i - period] for i in range(1, need - period + 1)):
            return True
    return False
