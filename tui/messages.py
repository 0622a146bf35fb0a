"""What the worker threads tell the screen. Posting is thread-safe and never blocks the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.message import Message

if TYPE_CHECKING:
    from tui.consultation import Event
    from tui.screens.opening import Opened
    from tui.widgets.transcript import AnswerTurn


class ModelOpened(Message):
    """The model and the library are loaded."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        super().__init__()


class OpeningFailed(Message):
    """The model or the library could not be loaded; ``cause`` says why and what to do."""

    def __init__(self, cause: str) -> None:
        self.cause = cause
        super().__init__()


class TurnProgress(Message):
    """One event of a running answer other than new text."""

    def __init__(self, turn: AnswerTurn, event: Event) -> None:
        self.turn = turn
        self.event = event
        super().__init__()


class TextArrived(Message):
    """There is text in the buffer of the running answer."""

    def __init__(self, turn: AnswerTurn) -> None:
        self.turn = turn
        super().__init__()


class TurnBroken(Message):
    """The consultation broke off without an answer object: a fault in this program, never a normal end."""

    def __init__(self, turn: AnswerTurn, cause: str) -> None:
        self.turn = turn
        self.cause = cause
        super().__init__()
