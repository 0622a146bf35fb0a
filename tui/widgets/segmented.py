"""A row of choices of which exactly one is chosen: the tasks and the modes."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget


class Segmented(Widget, can_focus=True):
    """Choices side by side; click one, or focus the row and use the arrow keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "上一项", show=False),
        Binding("right", "step(1)", "下一项", show=False),
    ]
    chosen: reactive[str] = reactive("")

    class Chosen(Message):
        """The user chose ``value``; not sent when the program sets `chosen`."""

        def __init__(self, control: Segmented, value: str) -> None:
            self.segmented = control
            self.value = value
            super().__init__()

        @property
        def control(self) -> Segmented:
            """The row the choice was made in."""
            return self.segmented

    def __init__(self, choices: dict[str, str], *, chosen: str, id: str) -> None:
        """``choices`` maps values to labels."""
        super().__init__(id=id)
        self.choices = choices
        self.set_reactive(Segmented.chosen, chosen)

    def render(self) -> Content:
        """The labels; the chosen one is reversed and, for those who see no colour, in brackets."""
        parts: list[Content | tuple[str, str]] = []
        for value, label in self.choices.items():
            if value == self.chosen:
                parts.append((f"[{label}]", "bold $segment-foreground on $segment-background"))
            else:
                parts.append((f" {label} ", "$muted"))
        return Content.assemble(*parts)

    def get_content_width(self, container: object, viewport: object) -> int:
        """All labels side by side."""
        return self.render().cell_length

    def step(self, by: int) -> None:
        """Choose the neighbour, around the end."""
        values = list(self.choices)
        self._choose(values[(values.index(self.chosen) + by) % len(values)])

    def action_step(self, by: int) -> None:
        """Arrow keys."""
        self.step(by)

    def on_click(self, event: events.Click) -> None:
        """Choose the label under the pointer."""
        if (offset := event.get_content_offset(self)) is None:
            return
        end = 0
        for value, label in self.choices.items():
            end += Content(label).cell_length + 2
            if offset.x < end:
                self._choose(value)
                return

    def _choose(self, value: str) -> None:
        if value != self.chosen:
            self.chosen = value
            self.post_message(self.Chosen(self, value))
