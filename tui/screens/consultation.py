"""The one screen: banner, task and mode, transcript, evidence, composer."""

from __future__ import annotations

from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingType
from textual.containers import Container, Horizontal
from textual.widgets import Footer, Static

from tui.consultation import Mode, Task
from tui.screens.answering import AnsweringScreen
from tui.screens.confirm import ConfirmScreen
from tui.screens.help import MODE_MEANING, HelpScreen
from tui.screens.opening import Opened, Opener
from tui.widgets.banner import Banner
from tui.widgets.composer import Composer
from tui.widgets.evidence import EvidencePanel
from tui.widgets.hint import HintLine
from tui.widgets.segmented import Segmented
from tui.widgets.transcript import AnswerTurn, Transcript
from tui.widgets.welcome import LoadFailure, Welcome


class ConsultationScreen(AnsweringScreen):
    """Everything the user sees and every key; `current` is the answer whose evidence is shown."""

    HORIZONTAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = [
        (0, "-small"),
        (80, "-medium"),
        (110, "-wide"),
    ]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "帮助"),
        Binding("f2", "new", "新会诊", tooltip="开始新会诊，清空当前对话"),
        Binding("f3", "evidence", "资料", tooltip="展开或收起资料原文"),
        Binding("f4", "task", "任务", tooltip="换任务：知识问答、循证诊断、治疗推荐"),
        Binding("f5", "again", "重答", tooltip="把最后一个问题再问一遍；模型没有打开时重试"),
        # Priority, because TextArea has a binding of its own on F6.
        Binding("f6", "mode", "模式", tooltip="换模式：摘录、依据、自由", priority=True),
        Binding("ctrl+q", "app.quit", "退出", priority=True, key_display="^Q"),
        Binding("escape", "stop", "停止", show=False, tooltip="停止正在写的回答"),
        Binding("ctrl+o", "copy", "复制", show=False, tooltip="复制当前回答和出处"),
        Binding("pageup", "scroll(-1)", "向上翻页", show=False, priority=True),
        Binding("pagedown", "scroll(1)", "向下翻页", show=False, priority=True),
        Binding("ctrl+up", "select(-1)", "看上一个回答的资料", show=False, priority=True),
        Binding("ctrl+down", "select(1)", "看下一个回答的资料", show=False, priority=True),
    ]

    def __init__(self, opener: Opener, task: Task, mode: Mode | None) -> None:
        super().__init__(opener)
        self.chosen_task, self.chosen_mode = task, mode or Mode.QUOTE
        self._mode_is_default = mode is None
        self.current: AnswerTurn | None = None
        self._renew_after_stop = False

    @property
    def active_bindings(self) -> dict[str, ActiveBinding]:
        """In the order of `BINDINGS`, so that the key line does not change with the focus."""
        order = [binding.key for binding in self.BINDINGS if isinstance(binding, Binding)]
        active = super().active_bindings
        return {key: active[key] for key in sorted(active, key=lambda key: order.index(key) if key in order else 99)}

    def compose(self) -> ComposeResult:
        """Everything is there from the first paint; the model comes later."""
        yield Banner()
        with Horizontal(id="choices"):
            yield Segmented({task: task.label for task in Task}, chosen=self.chosen_task, id="task")
            yield Static("模式", id="mode-label", markup=False)
            yield Segmented({mode: mode.label for mode in Mode}, chosen=self.chosen_mode, id="mode")
        with Container(id="body"):
            with Transcript(id="transcript"):
                yield Welcome()
            yield EvidencePanel(id="evidence")
        yield HintLine()
        yield Composer(id="composer")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Load after the first paint."""
        self.query_one(Composer).focus()
        self.show_hint()
        self.set_interval(1.0, self._tick)
        self.call_after_refresh(self.load)

    def ready(self, opened: Opened) -> None:
        """Say what the model is."""
        model = opened.model
        self.query(LoadFailure).remove()
        self.query_one(Welcome).show_notes(model.notes)
        self.query_one(Banner).show(demonstration=model.demonstration)
        self.query_one(HintLine).show_model(f"{model.name} · {model.quant}")
        if self._mode_is_default:
            self._set_mode(opened.consultation.mode or self.chosen_mode)
        self.show_hint()

    def failed(self, cause: str) -> None:
        """Say why and what to do."""
        self.query_one(Welcome).display = False
        self.query_one(Transcript).mount(LoadFailure(cause))
        self.show_hint()

    def changed(self, turn: AnswerTurn) -> None:
        """Bring the evidence up to date; after the end, do what had to wait for it."""
        if turn is self.current:
            self._show_evidence(turn)
        if not turn.ended:
            return
        composer = self.query_one(Composer)
        if turn.cancelled and not composer.text:
            composer.replace_text(turn.question)
        if self._renew_after_stop:
            self._renew()
        self.show_hint()

    @on(Composer.Submitted)
    def submit(self, message: Composer.Submitted) -> None:
        """Take the text out of the composer, or say why it stays there."""
        if not message.text:
            self.show_hint("请先输入问题", warning=True)
        elif self.load_failed:
            self.show_hint("模型没有打开，不能发送：F5 重试", warning=True)
        elif self.running is not None:
            self.show_hint("正在回答，Esc 停止后再发送", warning=True)
        else:
            self.query_one(Composer).take(message.text)
            self.ask(message.text)

    def ask(self, question: str) -> None:
        """Send a question; only while none is running."""
        self.query_one(Welcome).display = False
        turn = self.query_one(Transcript).add(question, self.chosen_task, self.chosen_mode)
        self._look_at(turn)
        self.run_turn(turn)
        self.show_hint()

    def _tick(self) -> None:
        if self.running is not None:
            self.running.refresh_activity()

    # Keys

    def action_stop(self) -> None:
        """Esc: stop the running answer, or take back a question that waits for the model."""
        if self.running is None:
            self.query_one(Composer).focus()
        else:
            self.stop_turn()
            if self.running is not None:
                self.show_hint("正在停止…")

    @work
    async def action_new(self) -> None:
        """F2: forget the conversation; asks first while an answer is running."""
        if self.running is not None and self.opened is not None:
            question = "正在回答。停止并开始新会诊吗？\n当前对话不会保存。"
            if not await self.app.push_screen_wait(ConfirmScreen(question, "开始新会诊")):
                return
        if self.running is None:
            self._renew()
        else:
            self._renew_after_stop = True
            self.stop_turn()

    def _renew(self) -> None:
        self._renew_after_stop = False
        if self.opened is not None:
            self.opened.consultation.reset()
        self.current = None
        self.query_one(Transcript).clear()
        self.query_one(Welcome).display = not self.load_failed
        self.query_one(EvidencePanel).clear()
        self.query_one(Composer).focus()
        self.show_hint()

    def action_again(self) -> None:
        """F5: ask the last question again as a new turn; the old answer stays. Retries a failed load."""
        if self.load_failed:
            self.load_failed = False
            self.query(LoadFailure).remove()
            self.query_one(Welcome).display = not self.query(AnswerTurn)
            self.load()
            self.show_hint()
        elif self.running is not None:
            self.show_hint("正在回答，Esc 停止后再重答", warning=True)
        elif answers := self.query_one(Transcript).answers:
            self.ask(answers[-1].question)
        else:
            self.show_hint("还没有问题可以重答", warning=True)

    def action_copy(self) -> None:
        """Ctrl+O: the answer being looked at, with its label and sources, to the clipboard."""
        if self.current is None or not self.current.text:
            self.show_hint("还没有可以复制的回答", warning=True)
            return
        self.app.copy_to_clipboard(self.current.plain())
        self.show_hint("已复制这个回答（连同出处）")

    def action_task(self) -> None:
        """F4: the next task."""
        self.query_one("#task", Segmented).step(1)

    def action_mode(self) -> None:
        """F6: the next mode."""
        self.query_one("#mode", Segmented).step(1)

    def action_evidence(self) -> None:
        """F3: open or close the passages."""
        self.query_one(EvidencePanel).toggle_class("-toggled")

    def action_scroll(self, direction: int) -> None:
        """Page through the transcript while the cursor stays in the composer."""
        transcript = self.query_one(Transcript)
        if direction < 0:
            transcript.scroll_page_up(animate=False)
        else:
            transcript.scroll_page_down(animate=False)

    def action_select(self, step: int) -> None:
        """Look at the evidence of the answer before or after."""
        answers = self.query_one(Transcript).answers
        if answers:
            index = answers.index(self.current) if self.current in answers else len(answers)
            turn = answers[max(0, min(len(answers) - 1, index + step))]
            self._look_at(turn)
            turn.scroll_visible(animate=False, top=True)

    def action_help(self) -> None:
        """F1."""
        bindings = [*Composer.BINDINGS, *self.BINDINGS]
        self.app.push_screen(HelpScreen(bindings, self.opened.model if self.opened else None))

    # What is shown

    @on(Segmented.Chosen, "#task")
    def choose_task(self, message: Segmented.Chosen) -> None:
        """Applies from the next question on."""
        self.chosen_task = Task(message.value)
        self.show_hint()

    @on(Segmented.Chosen, "#mode")
    def choose_mode(self, message: Segmented.Chosen) -> None:
        """Applies from the next question on."""
        self._mode_is_default = False
        self._set_mode(Mode(message.value))
        self.show_hint()

    @on(Welcome.ExampleChosen)
    def use_example(self, message: Welcome.ExampleChosen) -> None:
        """Put the example where it can be read, changed and sent."""
        self.chosen_task = message.task
        self.query_one("#task", Segmented).chosen = message.task
        composer = self.query_one(Composer)
        composer.replace_text(message.question)
        composer.focus()
        self.show_hint()

    @on(AnswerTurn.Selected)
    def look_at(self, message: AnswerTurn.Selected) -> None:
        """Show the evidence of the answer that was clicked."""
        self._look_at(message.turn)

    @on(Composer.Changed)
    def typing(self) -> None:
        """A complaint about the composer is over as soon as the user types."""
        self.show_hint()

    def _look_at(self, turn: AnswerTurn) -> None:
        if self.current is not None:
            self.current.remove_class("-current")
        turn.add_class("-current")
        self.current = turn
        self._show_evidence(turn)

    def _show_evidence(self, turn: AnswerTurn) -> None:
        self.query_one(EvidencePanel).show(turn.passages, turn.cited, turn.alarming, searched=turn.ended)

    def _set_mode(self, mode: Mode) -> None:
        self.chosen_mode = mode
        segmented = self.query_one("#mode", Segmented)
        segmented.chosen = mode
        segmented.set_class(mode is Mode.FREE, "-unchecked")

    def show_hint(self, text: str = "", *, warning: bool = False) -> None:
        """Say ``text`` above the composer, or what state the consultation is in."""
        if text:
            pass
        elif self.load_failed:
            text, warning = "模型没有打开：F5 重试", True
        elif self.opened is None:
            text = "正在加载模型，加载好后自动发送 · Esc 取消" if self.running else "正在加载模型，可以先输入"
        elif self.running is not None:
            text = "正在回答 · Esc 停止"
        else:
            text = f"{self.chosen_mode.label}：{MODE_MEANING[self.chosen_mode]} · Enter 发送 · Ctrl+J 换行"
            warning = self.chosen_mode is Mode.FREE
        self.query_one(HintLine).say(text, warning=warning)
