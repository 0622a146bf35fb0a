"""One consultation: search, prompt, engine, events. No Textual import; `ask` and the app share it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

from tui.engine.contract import ModelInfo, Prompts, sanitised
from tui.engine.process import Engine, EngineError
from tui.engine.quote import QuoteWeights
from tui.library import Library, Passage, SearchResult, Source
from tui.library.support import unsupported
from tui.quoting import cite_line, quote_spec

DEMONSTRATION_NOTICE = "演示模型，仅供演示，不可用于诊疗"
_EARLIER_TURNS = 2  # questions before this one whose evidence counts for a diagnosis
StopReason = Literal["eos", "stopped", "length", "context", "error"]


class Task(StrEnum):
    """What the question asks for."""

    KNOWLEDGE = "knowledge"
    DIAGNOSIS = "diagnosis"
    TREATMENT = "treatment"

    @property
    def label(self) -> str:
        """The Chinese name shown to the user."""
        return {"knowledge": "知识问答", "diagnosis": "循证诊断", "treatment": "治疗推荐"}[self.value]


class Mode(StrEnum):
    """How the answer is made: reviewed sentences only, free text over passages, or the bare model."""

    QUOTE = "quote"
    GROUNDED = "grounded"
    FREE = "free"

    @property
    def label(self) -> str:
        """The Chinese name shown to the user."""
        return {"quote": "摘录", "grounded": "依据", "free": "自由"}[self.value]


@dataclass(frozen=True)
class Found:
    """Event 1: the search is done, nothing is generated yet."""

    passages: tuple[Passage, ...]
    cards: tuple[str, ...] = ()
    confidence: float = 0.0


@dataclass(frozen=True)
class Reading:
    """Prefill progress in tokens."""

    done: int
    total: int


@dataclass(frozen=True)
class Delta:
    """New answer text, free of control characters and escape sequences."""

    text: str


@dataclass(frozen=True)
class Answer:
    """A whole answer with everything that must be shown or measured about it."""

    text: str
    mode: Mode
    task: Task
    passages: tuple[Passage, ...]
    cited: tuple[int, ...]
    refused: bool
    stop_reason: StopReason
    error: str | None
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    seconds: float
    first_token_seconds: float
    unsupported: tuple[str, ...] = ()  # sentences (grounded) that no passage supports
    cards: tuple[str, ...] = ()  # the three best card ids
    confidence: float = 0.0  # of the question being in scope, 0..1
    dropped_turns: int = 0  # oldest turns left out because the context was full

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens per second of the whole turn, reading the prompt included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Finished:
    """The last event of every turn."""

    answer: Answer


Event = Found | Reading | Delta | Finished


class Consultation:
    """The turns of one patient; `task` and `mode` may be set between turns."""

    def __init__(
        self,
        engine: Engine,
        library: Library,
        *,
        task: Task = Task.KNOWLEDGE,
        mode: Mode | None = None,
        weights: QuoteWeights | None = None,
    ) -> None:
        """`mode` None: quote with a demonstration model, else grounded. Does not wait for the engine."""
        self.engine, self.library, self.task = engine, library, task
        self._mode, self._weights = mode, weights or QuoteWeights()
        self._history: list[dict[str, str]] = []  # user and assistant messages as they were sent
        self._questions: list[str] = []
        self._asking = self._stopping = False

    @property
    def mode(self) -> Mode | None:
        """The mode of the next answer; None while it depends on a model that is still loading."""
        if self._mode is None and (info := self.engine.info) is not None:
            return Mode.QUOTE if info.demonstration else Mode.GROUNDED
        return self._mode

    @mode.setter
    def mode(self, mode: Mode | None) -> None:
        self._mode = mode

    def ask(self, question: str) -> Iterator[Event]:
        """Answer in the caller's thread; the last event is always Finished (errors are in its answer).

        Raises ValueError for an empty question and RuntimeError when an answer is still running.
        """
        question = sanitised(question).strip()
        if not question:
            raise ValueError("the question is empty")
        if self._asking:
            raise RuntimeError("the previous answer is still running")
        self._asking, self._stopping = True, False
        try:
            yield from self._ask(question)
        finally:
            self._asking = False

    def stop(self) -> None:
        """Thread-safe: the running `ask` ends within 0.3 s with stop_reason "stopped"."""
        self._stopping = self._asking
        self.engine.stop()

    def reset(self) -> None:
        """Forget all turns: a new consultation."""
        self._history.clear()
        self._questions.clear()

    def _ask(self, question: str) -> Iterator[Event]:
        begin, task = time.perf_counter(), self.task
        # Evidence comes in over several turns: what was said before still counts for the diagnosis.
        earlier = self._questions[-_EARLIER_TURNS:] if task is Task.DIAGNOSIS else []
        found = self.library.search(question, task=task.value, earlier=earlier)
        yield Found(found.passages, found.cards, found.confidence)
        turn = _Turn(question, task, self._mode or Mode.GROUNDED, found)
        try:
            for event in self._events(turn):
                match event["event"]:
                    case "reading":
                        yield Reading(event["done"], event["total"])
                    case "delta" if text := sanitised(event["text"]):
                        turn.text += text
                        yield Delta(text)
                    case "finished":
                        turn.end = event
        except EngineError as error:
            turn.end = {"stop_reason": "error", "error": str(error)}
        answer = turn.answer(time.perf_counter() - begin)
        if answer.text and answer.stop_reason != "error":
            del self._history[: 2 * answer.dropped_turns]
            self._history += [
                {"role": "user", "content": turn.content},
                {"role": "assistant", "content": answer.text},
            ]
        self._questions.append(question)
        yield Finished(answer)

    def _events(self, turn: _Turn) -> Iterator[dict[str, Any]]:
        """Prompt and engine; the mode is settled when the model is known."""
        if (info := self._wait()) is None:
            yield {"event": "finished", "stop_reason": "stopped"}
            return
        turn.mode = self.mode or Mode.GROUNDED
        prompts = turn.prompts = info.prompts
        turn.content = turn.question
        if turn.mode is not Mode.FREE:
            written = "".join(prompts.passage(p.number, p.title, p.section, p.sentences) for p in turn.found.passages)
            turn.content = prompts.question(turn.question, written)
        request: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": prompts.system(turn.task.value, grounded=turn.mode is not Mode.FREE)},
                *self._history,
                {"role": "user", "content": turn.content},
            ]
        }
        if turn.mode is Mode.QUOTE:
            request["quote"] = asdict(quote_spec(prompts, turn.found, turn.question, self._weights))
        for event in self.engine.generate(request):
            if self._stopping:  # asked before the engine was running
                self.engine.stop()
            yield event

    def _wait(self) -> ModelInfo | None:
        """Wait for the model; None when stopped meanwhile."""
        while (info := self.engine.poll_ready(0.05)) is None:
            if self._stopping:
                return None
        return info


@dataclass
class _Turn:
    """What is known about the running turn."""

    question: str
    task: Task
    mode: Mode
    found: SearchResult
    content: str = ""
    text: str = ""
    prompts: Prompts | None = None
    end: dict[str, Any] = field(default_factory=dict)

    def answer(self, seconds: float) -> Answer:
        """The whole answer, after the last event; `seconds` since the question."""
        end, pieces = self.end, self.end.get("pieces", [])
        sentences = [passage + 1 for kind, passage, _ in pieces if kind == "sentence"]
        cited = dict.fromkeys(sentences or [int(n) for n in re.findall(r"\[(\d+)\]", self.text)])
        numbers = {passage.number for passage in self.found.passages} if self.mode is not Mode.FREE else set()
        phrases = self.prompts.phrases if self.prompts else None
        refused = any(kind == "refusal" for kind, *_ in pieces) or bool(
            phrases and not pieces and self.text.strip() and phrases.refusal.strip() in self.text
        )
        doubtful: tuple[str, ...] = ()
        if self.mode is Mode.GROUNDED and phrases:
            fixed = [*phrases.openings, *phrases.closings, phrases.refusal, phrases.identity, phrases.prescription]
            fixed += [cite_line(phrases, passage) for passage in self.found.passages]
            doubtful = unsupported(self.text, [p.sentences for p in self.found.passages], fixed)
        return Answer(
            text=self.text,
            mode=self.mode,
            task=self.task,
            passages=self.found.passages,
            cited=tuple(number for number in cited if number in numbers),
            refused=refused,
            stop_reason=end.get("stop_reason", "error"),
            error=end.get("error"),
            tokens=end.get("tokens", 0),
            prompt_tokens=end.get("prompt_tokens", 0),
            reused_tokens=end.get("reused_tokens", 0),
            seconds=end.get("seconds", seconds),
            first_token_seconds=end.get("first_token_seconds", seconds),
            unsupported=doubtful,
            cards=self.found.cards,
            confidence=self.found.confidence,
            dropped_turns=end.get("dropped_turns", 0),
        )


__all__ = [
    "DEMONSTRATION_NOTICE",
    "Answer",
    "Consultation",
    "Delta",
    "Event",
    "Finished",
    "Found",
    "Mode",
    "Passage",
    "Reading",
    "Source",
    "Task",
    "sanitised",
]  # fmt: skip
