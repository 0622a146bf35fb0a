"""The line above the composer: what the app is waiting for, what a key did, which model answers."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Static

from tui.widgets.text import printable


class HintLine(Horizontal):
    """One line; a warning is bold as well as coloured."""

    def compose(self) -> ComposeResult:
        """Hint to the left, model to the right where there is room."""
        yield Static("", id="hint", markup=False)
        yield Static("", id="model", markup=False)

    @property
    def text(self) -> str:
        """What the line says now."""
        return self._text

    def say(self, text: str, *, warning: bool = False) -> None:
        """Replace the hint."""
        self._text = text
        hint = self.query_one("#hint", Static)
        hint.update(text)
        hint.set_class(warning, "-warning")

    def show_model(self, text: str) -> None:
        """Name the model."""
        self.query_one("#model", Static).update(printable(text))
