"""Opening the model and running one answer at a time, in worker threads; text arrives in batches."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from time import monotonic

from textual import work
from textual.message import Message
from textual.screen import Screen

from tui.consultation import Consultation, Delta, Finished
from tui.messages import ModelOpened, OpeningFailed, TextArrived, TurnBroken, TurnProgress
from tui.screens.opening import Opened, Opener
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


def answer(consultation: Consultation, turn: AnswerTurn, buffer: TextBuffer, post: Callable[[Message], object]) -> None:
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
            if turn.stop_requested:  # asked for before `ask` had begun, where `stop` has no effect
                consultation.stop()
    except Exception as error:  # the partial answer must be kept and labelled, whatever went wrong
        post(TurnBroken(turn, str(error) or type(error).__name__))
    else:
        post(TurnProgress(turn, last) if last else TurnBroken(turn, "回答没有正常结束。"))


class AnsweringScreen(Screen[None]):
    """Holds what was opened and the running answer. The subclass shows them: `changed`, `ready`, `failed`."""

    def __init__(self, opener: Opener) -> None:
        super().__init__()
        self._opener = opener
        self.opened: Opened | None = None
        self.load_failed = False
        self.running: AnswerTurn | None = None
        self._buffer = TextBuffer()
        self._flushed_at = 0.0

    def changed(self, turn: AnswerTurn) -> None:
        """``turn`` shows more than before, or has ended."""
        raise NotImplementedError

    def ready(self, opened: Opened) -> None:
        """The model is loaded."""
        raise NotImplementedError

    def failed(self, cause: str) -> None:
        """The model could not be opened."""
        raise NotImplementedError

    @work(thread=True, group="load")
    def load(self) -> None:
        """Open the model; ends in `ready` or `failed`."""
        try:
            opened = self._opener.open()
        except Exception as error:  # whatever it is, the user sees it in the panel, not as a traceback
            self.post_message(OpeningFailed(str(error) or type(error).__name__))
        else:
            self.post_message(ModelOpened(opened))

    def run_turn(self, turn: AnswerTurn) -> None:
        """Make ``turn`` the running one; it starts at once, or when the model is loaded."""
        self.running = turn
        if self.opened is not None:
            self._start(self.opened.consultation, turn)

    def stop_turn(self) -> None:
        """Stop the running answer; one that has not started is cancelled."""
        if self.running is None:
            return
        if self.opened is None:
            self.running.cancel()
            self._end(self.running)
        else:
            self.running.stop_requested = True
            self.opened.consultation.stop()

    def on_model_opened(self, message: ModelOpened) -> None:
        """Start what waits."""
        self.opened = message.opened
        self.load_failed = False
        self.ready(message.opened)
        if self.running is not None:
            self._start(message.opened.consultation, self.running)

    def on_opening_failed(self, message: OpeningFailed) -> None:
        """Give back what waits."""
        self.load_failed = True
        self.failed(message.cause)
        self.stop_turn()

    def on_text_arrived(self, message: TextArrived) -> None:
        """Show new text now, or at the end of the current batch."""
        if message.turn is self.running:
            wait = self._flushed_at + BATCH_SECONDS - monotonic()
            if wait > 0:
                self.set_timer(wait, self._flush)
            else:
                self._flush()

    def on_turn_progress(self, message: TurnProgress) -> None:
        """Show one event; late ones of a turn that is gone are dropped."""
        if message.turn is self.running:
            message.turn.apply(message.event)
            if message.turn.ended:
                self._end(message.turn)
            else:
                self.changed(message.turn)

    def on_turn_broken(self, message: TurnBroken) -> None:
        """Keep and label what there is."""
        if message.turn is self.running:
            self._flush()
            message.turn.break_off(message.cause)
            self._end(message.turn)

    def _start(self, consultation: Consultation, turn: AnswerTurn) -> None:
        consultation.task, consultation.mode = turn.asked_task, turn.mode
        turn.begin()
        self._buffer = TextBuffer()  # text of an earlier turn that is still under way stays in its own
        self._answer(consultation, turn, self._buffer)

    @work(thread=True, group="answer")
    def _answer(self, consultation: Consultation, turn: AnswerTurn, buffer: TextBuffer) -> None:
        answer(consultation, turn, buffer, self.post_message)

    def _flush(self) -> None:
        self._flushed_at = monotonic()
        text = self._buffer.take()
        if text and self.running is not None:
            self.running.apply(Delta(text))
            self.changed(self.running)

    def _end(self, turn: AnswerTurn) -> None:
        self.running = None
        self.changed(turn)
