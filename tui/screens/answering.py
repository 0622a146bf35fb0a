"""One answer in its worker thread: events to the screen, text in batches."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from textual.message import Message

from tui.consultation import Consultation, Delta, Finished
from tui.messages import TextArrived, TurnBroken, TurnProgress
from tui.widgets.transcript import AnswerTurn

BATCH_SECONDS = 0.033  # at most 30 repaints a second, however fast the model writes


class TextBuffer:
    """Text on its way from the model's thread to the screen; one message is under way at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._parts: list[str] = []

    def put(self, text: str) -> bool:
        """Add text; True when the buffer was empty, so that the screen has to be told."""
        with self._lock:
            self._parts.append(text)
            return len(self._parts) == 1

    def take(self) -> str:
        """Remove and return everything."""
        with self._lock:
            text = "".join(self._parts)
            self._parts.clear()
            return text


def answer(
    consultation: Consultation, turn: AnswerTurn, buffer: TextBuffer, post: Callable[[Message], object]
) -> None:
    """Run a turn to its end; never raises, whatever happens is told to the screen.

    `Finished` is posted only when the consultation has let go of the engine, so that the next turn may start.
    """
    last: Finished | None = None
    try:
        for event in consultation.ask(turn.question):
            if isinstance(event, Finished):
                last = event
            elif not isinstance(event, Delta):
                post(TurnProgress(turn, event))
            elif buffer.put(event.text):
                post(TextArrived(turn))
    except Exception as error:  # the partial answer must be kept and labelled, whatever went wrong
        post(TurnBroken(turn, str(error) or type(error).__name__))
    else:
        post(TurnProgress(turn, last) if last else TurnBroken(turn, "回答没有正常结束。"))
