"""The conversation: questions, answers while they are written, and how each of them ended."""

from __future__ import annotations

from time import monotonic

from textual import events
from textual.app import ComposeResult
from textual.containers import VerticalGroup, VerticalScroll
from textual.message import Message
from textual.widgets import Static

from tui.consultation import Answer, Delta, Event, Finished, Found, Mode, Passage, Reading, Task
from tui.widgets.text import answer_content, cited_numbers, printable, source_line

LABEL = "AI 生成 · 供医务人员参考"
UNFINISHED = "未完成，请勿据此用药"
_ENDINGS = {
    "stopped": f"已停止 · {UNFINISHED}",
    "length": f"达到长度上限 · {UNFINISHED}",
    "context": f"对话太长，上下文已满 · {UNFINISHED}",
    "error": f"出错中断 · {UNFINISHED}",
}
_REMEDIES = {
    "length": "可以把问题问得更具体，再问一次。",
    "context": "按 F2 开始新会诊，把问题写短一些再问。",
    "error": "已显示的文字保留；再次发送会自动重启模型。",
}


class UserTurn(VerticalGroup):
    """One question as it was sent."""

    def __init__(self, question: str, task: Task) -> None:
        super().__init__()
        self.question, self.asked_task = question, task

    def compose(self) -> ComposeResult:
        """Who, then the words."""
        yield Static(f"您 · {self.asked_task.label}", classes="turn-head", markup=False)
        yield Static(self.question, classes="turn-body", markup=False)


class AnswerTurn(VerticalGroup):
    """One answer: its label, its text, what is going on, and how it ended.

    `answer` is None while it runs. `text` and `passages` are always what is on the screen.
    """

    class Selected(Message):
        """The user clicked on an answer to see its evidence."""

        def __init__(self, turn: AnswerTurn) -> None:
            self.turn = turn
            super().__init__()

    def __init__(self, question: str, task: Task, mode: Mode) -> None:
        super().__init__()
        self.question, self.asked_task, self.mode = question, task, mode
        self.text = ""
        self.passages: tuple[Passage, ...] = ()
        self.cited: tuple[int, ...] = ()
        self.answer: Answer | None = None
        self.ended, self.cancelled, self.stop_requested = False, False, False
        self.ending = ""
        self._activity = "等待模型加载"
        self._since: float | None = None
        self._body = Static("", classes="turn-body", markup=False)
        self._body.display = False  # no empty line before the first word
        self._ending = Static("", classes="turn-ending", markup=False)
        self._meta = Static("", classes="turn-meta", markup=False)

    @property
    def alarming(self) -> tuple[int, ...]:
        """Numbers of the passages whose danger signs belong beside the answer.

        Those it cites. Text over passages need not cite any, and must not go without: then the first one found,
        at once in grounded mode, after the end in quote mode, where the citation only has not come yet.
        """
        cites_later = self.mode is Mode.QUOTE and not self.ended
        refused = self.answer is not None and self.answer.refused
        if self.cited or cites_later or refused:
            return self.cited
        return self._citable[:1]

    @property
    def _citable(self) -> tuple[int, ...]:
        # In free mode the model has not seen the passages: a [1] in its text is no citation.
        return () if self.mode is Mode.FREE else tuple(passage.number for passage in self.passages)

    def compose(self) -> ComposeResult:
        """The label first: no word of an answer stands without it."""
        yield Static(f"{LABEL} · {self.mode.label}", classes="turn-head", markup=False)
        yield self._body
        yield self._ending
        yield self._meta

    def on_mount(self) -> None:
        """Show at once that something happens."""
        self.refresh_activity()

    def on_click(self, event: events.Click) -> None:
        """Bring the evidence of this answer to the panel."""
        self.post_message(self.Selected(self))

    def begin(self) -> None:
        """The question goes to the model now."""
        self._activity, self._since = "正在查找资料", monotonic()
        self.refresh_activity()

    def refresh_activity(self) -> None:
        """Rewrite the line that says what is going on; does nothing after the end."""
        if self.ended:
            return
        parts = [f"{self._activity}…"]
        if self.text:
            parts.append(f"{_characters(self.text)} 字")
        if self._since is not None:
            parts.append(f"{monotonic() - self._since:.0f} 秒")
        self._meta.update(" · ".join([*parts, "Esc 停止"]))

    def apply(self, event: Event) -> None:
        """Show one event of the consultation; the last one is `Finished`."""
        match event:
            case Found(passages=passages):
                self.passages = passages
                self._activity = "正在阅读资料"
            case Reading(done=done, total=total):
                self._activity = f"正在阅读资料 {100 * done // max(total, 1)}%"
            case Delta(text=text):
                self._activity = "正在回答"
                self.text += text
                self.cited = cited_numbers(self.text, self._citable)
                self._show_text()
            case Finished(answer=answer):
                self._finish(answer)
                return
        self.refresh_activity()

    def cancel(self) -> None:
        """Stopped before the question went to the model."""
        self.cancelled = True
        self._end("已取消，没有发送", (), "")

    def break_off(self, cause: str) -> None:
        """End without an answer object; what was written stays and is labelled."""
        self._end(_ENDINGS["error"], (printable(cause), _REMEDIES["error"]), "")

    def plain(self) -> str:
        """The answer for the clipboard: never without its label, its ending and its sources."""
        lines = [f"{LABEL}（{self.mode.label}）", self.text.strip("\n")]
        lines += [self.ending] if self.ending else []
        for passage in self.passages:
            if passage.number in self.cited:
                sources = "；".join(source_line(source) for source in passage.sources)
                lines.append(f"[{passage.number}] {passage.title}·{passage.section}　{sources}")
        return "\n".join(lines)

    def _finish(self, answer: Answer) -> None:
        self.answer = answer
        self.passages, self.text, self.cited = answer.passages, answer.text, answer.cited
        self._show_text(answer.unsupported)
        remedies = [printable(answer.error)] if answer.error else []
        if remedy := _REMEDIES.get(answer.stop_reason):
            remedies.append(remedy)
        self._end(_ENDINGS.get(answer.stop_reason, ""), tuple(remedies), _figures(answer))

    def _end(self, ending: str, remedies: tuple[str, ...], figures: str) -> None:
        self.ended, self.ending = True, ending
        self._ending.update("\n".join([ending, *remedies]))
        self._meta.update(figures)
        self.set_class(bool(ending), "-unfinished")

    def _show_text(self, unsupported: tuple[str, ...] = ()) -> None:
        self._body.display = bool(self.text.strip())
        self._body.update(answer_content(self.text, self._citable, unsupported))


class Transcript(VerticalScroll, can_focus=True):
    """All turns; follows the end until the user scrolls away from it, and again when he comes back.

    Textual's `anchor` would do this too, but it pushes a short conversation to the bottom of the screen.
    """

    NEAR = 2  # rows from the end that still count as being there

    def on_mount(self) -> None:
        """The welcome is read from its beginning."""
        self.follow = False

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Where the user leaves the transcript decides whether it goes on following."""
        super().watch_scroll_y(old_value, new_value)
        self.follow = new_value >= self.max_scroll_y - self.NEAR

    def watch_virtual_size(self) -> None:
        """There is more text."""
        self._keep_end()

    def on_resize(self) -> None:
        """The same text takes another number of rows."""
        self._keep_end()

    @property
    def answers(self) -> list[AnswerTurn]:
        """All answers, oldest first."""
        return list(self.query(AnswerTurn))

    def add(self, question: str, task: Task, mode: Mode) -> AnswerTurn:
        """Append a question and the place for its answer, and follow it."""
        turn = AnswerTurn(question, task, mode)
        self.mount(UserTurn(question, task), turn)
        self.follow = True
        return turn

    def clear(self) -> None:
        """Take all turns away."""
        self.query("UserTurn, AnswerTurn").remove()
        self.follow = False

    def _keep_end(self) -> None:
        if self.is_mounted and self.follow:
            self.call_after_refresh(self._to_end)

    def _to_end(self) -> None:
        if self.follow:  # unless the user has scrolled away meanwhile
            self.scroll_end(animate=False, immediate=True)


def _characters(text: str) -> int:
    return len("".join(text.split()))


def _figures(answer: Answer) -> str:
    parts = [f"{_characters(answer.text)} 字"]
    decoding = answer.seconds - answer.first_token_seconds
    if answer.tokens and decoding > 0.1:  # seconds; quoted sentences may take no time to write, then it says nothing
        parts.append(f"{_characters(answer.text) / decoding:.0f} 字/秒")
    if answer.tokens:
        parts += [f"首字 {answer.first_token_seconds:.1f} 秒", f"{answer.tokens} 词元"]
    if answer.dropped_turns:
        parts.append(f"较早的 {answer.dropped_turns} 轮未参与")
    return " · ".join(parts)
