"""The consultation app: one screen over one consultation."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.theme import Theme

from tui import wrapping
from tui.consultation import Mode, Task
from tui.screens.confirm import ConfirmScreen
from tui.screens.consultation import ConsultationScreen
from tui.screens.opening import ModelOpener, Opener

# Danger and warning keep a contrast of at least 4.5:1 on the background, text of 10:1.
CLINIC = Theme(
    name="clinic",
    primary="#6cc5b0",
    secondary="#7fb2d9",
    accent="#7fb2d9",
    warning="#e8b75a",
    error="#f08a80",
    success="#8ccf7e",
    foreground="#e6ecec",
    background="#11191d",
    surface="#172126",
    panel="#1d2a30",
    dark=True,
    variables={
        "danger": "#f5968c",
        "muted": "#a3b4b8",
        "faint": "#7b8d92",
        "segment-background": "#6cc5b0",
        "segment-foreground": "#0c1417",
        "footer-key-foreground": "#6cc5b0",
        "footer-background": "#11191d",
        "footer-description-foreground": "#9fb1b5",
        "block-cursor-background": "#24444a",
        "block-cursor-foreground": "#e6ecec",
        "block-cursor-text-style": "none",
        "scrollbar": "#2b3c43",
        "scrollbar-hover": "#3b525b",
        "scrollbar-active": "#6cc5b0",
        "scrollbar-background": "#11191d",
        "scrollbar-background-hover": "#11191d",
        "scrollbar-background-active": "#11191d",
    },
)


_KEY_NAMES = {"escape": "Esc", "pageup": "PgUp", "pagedown": "PgDn", "up": "↑", "down": "↓"}


class ConsultationApp(App[None]):
    """The terminal consultation. `opener` loads the model in a worker after the first paint.

    `ascii_only` draws without box lines, for consoles that show them two cells wide.
    """

    TITLE = "儿科助手"
    CSS_PATH = Path(__file__).with_name("app.tcss")
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+q", "quit", "退出", show=False, priority=True)]

    def __init__(
        self,
        opener: Opener,
        *,
        task: Task = Task.KNOWLEDGE,
        mode: Mode | None = None,
        ascii_only: bool = False,
    ) -> None:
        wrapping.install()
        super().__init__()
        self._opener = opener
        self.consultation_screen = ConsultationScreen(opener, task, mode)
        self.register_theme(CLINIC)
        self.theme = CLINIC.name
        self.set_class(ascii_only, "-ascii")

    def get_default_screen(self) -> ConsultationScreen:
        """The only screen that stays."""
        return self.consultation_screen

    def get_key_display(self, binding: Binding) -> str:
        """Keys as they are printed on a keyboard: F1, Esc, Enter, Ctrl+Q."""
        if binding.key_display:
            return binding.key_display
        parts = binding.key.split(",")[0].split("+")
        return "+".join(_KEY_NAMES.get(part, part.capitalize()) for part in parts)

    async def action_quit(self) -> None:
        """Ctrl+Q: quit; asks first while an answer is running."""
        if self.consultation_screen.running is None:
            self.exit()
        elif not isinstance(self.screen, ConfirmScreen):
            question = "正在回答。停止并退出吗？\n当前对话不会保存。"
            self.push_screen(ConfirmScreen(question, "退出"), self._quit_if)

    def action_help_quit(self) -> None:
        """Ctrl+C does not quit; say what does."""
        self.consultation_screen.show_hint("按 Ctrl+Q 退出")

    def _quit_if(self, confirmed: bool | None) -> None:
        if confirmed:
            self.exit()

    def on_mount(self) -> None:
        """End in order when the system asks for it or the terminal is gone.

        A closed window must not leave an app behind that reads the end of a dead terminal for ever, even where it was
        started with hang-ups ignored (nohup, some multiplexers).
        """
        if sys.platform != "win32":  # where asyncio knows no signal handlers
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGHUP):
                loop.add_signal_handler(number, self._terminate, number)

    def _terminate(self, number: signal.Signals) -> None:
        self.exit(return_code=128 + number)

    def on_unmount(self) -> None:
        """Let waiting threads go: closing the engine ends loading and generating."""
        if self.consultation_screen.opened is not None:
            self.consultation_screen.opened.consultation.stop()
        self._opener.close()


def run(
    model_path: Path | None,
    task: Task,
    mode: Mode | None,
    *,
    context: int = 2048,
    threads: int | None = None,
    ascii_only: bool = False,
) -> int:
    """Run the consultation until the user quits; ``context`` in tokens, ``threads`` None for the physical cores.

    Returns 0, or 2 when the model could not be opened and the user gave up, or 128 + the signal (SIGTERM, SIGHUP).
    """
    opener = ModelOpener(model_path, task, mode, context=context, threads=threads)
    app = ConsultationApp(opener, task=task, mode=mode, ascii_only=ascii_only)
    app.run()
    return app.return_code or (2 if app.consultation_screen.load_failed else 0)
