"""A question before a running answer is given up."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalGroup
from textual.screen import ModalScreen
from textual.widgets import Button, Static


class ConfirmScreen(ModalScreen[bool]):
    """Asks ``question``; True only when the user chooses ``action``. Esc keeps everything as it is."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(False)", "取消"),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]

    def __init__(self, question: str, action: str) -> None:
        super().__init__()
        self._question, self._action = question, action

    def compose(self) -> ComposeResult:
        """The harmless button comes first and has the focus."""
        with VerticalGroup(id="dialog"):
            yield Static(self._question, markup=False)
            with Horizontal(id="buttons"):
                yield Button("继续等待", id="keep", compact=True)
                yield Button(self._action, id="act", variant="warning", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Answer the question."""
        self.dismiss(event.button.id == "act")
