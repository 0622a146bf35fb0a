"""The live view of a run in the terminal: one bar per stage, and the figures of the stage in progress."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

_QUIET_SECONDS = 30.0  # between two lines where there is no terminal to redraw


class View:
    """`with View(console) as view:`; on a pipe or in a log it prints a line now and then instead of redrawing."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description:<5}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True), console=console, expand=True,
        )  # fmt: skip
        self._figures = Text()
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render)
        self._task: TaskID | None = None
        self._name = ""
        self._said = -_QUIET_SECONDS

    def __enter__(self) -> View:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._figures = Text()
        if self.console.is_terminal:
            self._live.stop()

    def stage(self, name: str, step: int, steps: int) -> None:
        """A stage begins (or goes on) at `step`."""
        self._name = name.upper()
        self._task = self._progress.add_task(self._name, total=steps, completed=step)
        self._figures = Text()

    def step(self, step: int) -> None:
        """The bar moves."""
        if self._task is not None:
            self._progress.update(self._task, completed=step)

    def figures(self, step: int, steps: int, figures: dict[str, float]) -> None:
        """New figures were logged (names as in metrics.jsonl)."""
        parts = [text for name, value in figures.items() if (text := _written(name, value))]
        self._figures = Text("      " + "  ".join(parts), style="dim")
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._said >= _QUIET_SECONDS or step == steps):
            self._said = now
            self.console.print(f"{self._name} {step}/{steps}  " + "  ".join(parts), soft_wrap=True, highlight=False)

    def say(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text, soft_wrap=True, highlight=False)

    def _render(self) -> Group:
        return Group(self._progress.get_renderable(), self._figures)


def _written(name: str, value: float) -> str:
    match name:
        case "loss" | "eval_loss":
            return f"{name.replace('eval_loss', 'held-out')} {value:.3f}"
        case "learning_rate":
            return f"lr {value:.1e}"
        case "grad_norm":
            return f"|g| {value:.2f}"
        case "tokens_per_second":
            return f"{value:,.0f} tok/s"
        case "mfu":
            return f"MFU {value:.0%}"
        case "memory_bytes":
            return f"{value / 1e9:.1f} GB"
        case "rewards/accuracies":
            return f"preferred {value:.0%}"
    return ""
