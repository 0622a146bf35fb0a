"""What the transcript shows before the first question, and when there is no model."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalGroup
from textual.message import Message
from textual.widgets import OptionList, Static

from tui.consultation import Task
from tui.widgets.text import printable

EXAMPLES = (
    (Task.KNOWLEDGE, "手足口病在家怎么护理？什么时候要去医院？"),
    (Task.DIAGNOSIS, "2岁，发热三天，手心脚心起红点，可能是什么病？"),
    (Task.TREATMENT, "1岁孩子拉肚子两天，怎么补液？"),
)


class Welcome(VerticalGroup):
    """What this is, three questions to start with, what this is not."""

    class ExampleChosen(Message):
        """The user picked an example."""

        def __init__(self, task: Task, question: str) -> None:
            self.task, self.question = task, question
            super().__init__()

    def compose(self) -> ComposeResult:
        """Static text around a list of examples."""
        yield Static("儿科问诊与知识助手", id="welcome-title", markup=False)
        yield Static(
            "在这台电脑上回答，不联网。每个问题先查内置的儿科资料，并列出条目、出处和危险信号。",
            markup=False,
        )
        yield Static("可以这样问（Tab 选中，方向键移动，Enter 填入）", id="welcome-examples", markup=False)
        yield OptionList(*(f"{task.label}  {question}" for task, question in EXAMPLES), markup=False, compact=True)
        yield Static(
            "它不是医生，不能代替诊断、处方和急救。情况危急时先转诊或拨打 120。",
            id="welcome-limits",
            markup=False,
        )
        yield Static("", id="welcome-notes", markup=False)

    def show_notes(self, notes: tuple[str, ...]) -> None:
        """Show what the user should know about the loaded model."""
        self.query_one("#welcome-notes", Static).update(printable("\n".join(notes)))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter or click on an example."""
        event.stop()
        self.post_message(self.ExampleChosen(*EXAMPLES[event.option_index]))


class LoadFailure(VerticalGroup):
    """Why there is no model, and what to do."""

    def __init__(self, cause: str) -> None:
        super().__init__()
        self.cause = printable(cause)

    def compose(self) -> ComposeResult:
        """Cause, then the two ways on."""
        yield Static("模型没有打开，暂时不能回答", id="failure-title", markup=False)
        yield Static(self.cause, id="failure-cause", markup=False)
        yield Static("F5 重试    Ctrl+Q 退出", id="failure-remedy", markup=False)
