"""One consultation: search, prompt, engine, events. No Textual import; `ask` and the app share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from tui.engine.process import Engine
from tui.library import Library, Passage, Source

DEMONSTRATION_NOTICE = "演示模型，仅供演示，不可用于诊疗"
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
        """Answer tokens per second after the first token."""
        decoding = self.seconds - self.first_token_seconds
        return self.tokens / decoding if decoding > 0 else 0.0


@dataclass(frozen=True)
class Finished:
    """The last event of every turn."""

    answer: Answer


Event = Found | Reading | Delta | Finished


class Consultation:
    """The turns of one patient; `task` and `mode` may be set between turns."""

    def __init__(
        self, engine: Engine, library: Library, *, task: Task = Task.KNOWLEDGE, mode: Mode | None = None
    ) -> None:
        self.engine, self.library = engine, library
        self.task, self.mode = task, mode

    def ask(self, question: str) -> Iterator[Event]:
        """Answer in the caller's thread; the last event is always Finished (errors are in its answer)."""
        raise NotImplementedError

    def stop(self) -> None:
        """Thread-safe: the running `ask` ends within 0.3 s with stop_reason "stopped"."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all turns: a new consultation."""
        raise NotImplementedError


__all__ = [
    "Answer", "Consultation", "DEMONSTRATION_NOTICE", "Delta", "Event", "Finished", "Found", "Mode", "Passage",
    "Reading", "Source", "Task",
]
