"""Where the question is written."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from tui.widgets.text import printable


class Composer(TextArea):
    """Several lines of text; Enter sends, Ctrl+J breaks the line, the height follows the text."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "发送", show=False),
        Binding("ctrl+j,shift+enter", "line_break", "换行", show=False),
    ]

    class Submitted(Message):
        """The user wants to send ``text`` (stripped, possibly empty)."""

        def __init__(self, text: str) -> None:
            self.text = text
            super().__init__()

    def __init__(self, *, id: str) -> None:
        super().__init__(
            id=id,
            soft_wrap=True,
            compact=True,
            show_line_numbers=False,
            highlight_cursor_line=False,
            placeholder="请输入问题，例如年龄、症状、持续多久、精神和进食情况",
        )

    async def _on_key(self, event: events.Key) -> None:
        # Not by a priority binding: the app would run that before the keys that still wait in the queue of this
        # widget, so that Enter right after fast typing (or an input method) would find an empty text.
        if event.key == "enter":
            event.stop()
            event.prevent_default()  # the base class would insert a line end
            self.action_submit()

    async def _on_paste(self, event: events.Paste) -> None:
        # Textual would call the handler of the base class again with the raw text.
        event.prevent_default()
        await super()._on_paste(events.Paste(printable(event.text)))

    def action_submit(self) -> None:
        """Offer the text to the screen; it stays here until the screen takes it."""
        self.post_message(self.Submitted(printable(self.text).strip()))

    def take(self, text: str) -> None:
        """Remove ``text``, as it was submitted; what was typed since then stays."""
        self.replace_text(printable(self.text).lstrip().removeprefix(text).lstrip())

    def action_line_break(self) -> None:
        """Insert a line end at the cursor."""
        self.insert("\n")

    def replace_text(self, text: str) -> None:
        """Put ``text`` here with the cursor at its end."""
        self.text = text
        self.move_cursor(self.document.end)
