"""The line that never leaves the screen: what this is and what it must not be used for."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Static

NOT_A_DOCTOR = "仅供基层医务人员参考，不能代替医生诊断"
DEMONSTRATION = "演示模型 · 不可用于诊疗"


class Banner(Horizontal):
    """Name, warning and, where there is room, the limits of use."""

    def compose(self) -> ComposeResult:
        """The warning is the general one until the model says what it is."""
        yield Static("儿科助手 · 离线", id="name", markup=False)
        yield Static(NOT_A_DOCTOR, id="warning", markup=False)
        yield Static(NOT_A_DOCTOR, id="limits", markup=False)

    def show(self, *, demonstration: bool) -> None:
        """Say which kind of model answers."""
        self.set_class(demonstration, "-demonstration")
        self.query_one("#warning", Static).update(DEMONSTRATION if demonstration else NOT_A_DOCTOR)
