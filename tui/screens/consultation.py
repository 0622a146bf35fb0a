"""The one screen: banner, task and mode, transcript, evidence, composer."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic

from textual import on, work
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding
from textual.containers import Container, Horizontal
from textual.screen import Screen
from textual.widgets import Footer, Static

from tui.consultation import Consultation, Delta, Event, Mode, Task
from tui.messages import SessionFailed, SessionReady, TextArrived, TurnBroken, TurnProgress
from tui.screens.answering import BATCH_SECONDS, TextBuffer, answer
from tui.screens.confirm import ConfirmScreen
from tui.screens.help import MODE_MEANING, HelpScreen
from tui.screens.session import Opener, Session
from tui.widgets.banner import Banner
from tui.widgets.composer import Composer
from tui.widgets.evidence import EvidencePanel
from tui.widgets.hint import HintLine
from tui.widgets.segmented import Segmented
from tui.widgets.transcript import AnswerTurn, Transcript
from tui.widgets.welcome import LoadFailure, Welcome


class ConsultationScreen(Screen[None]):
    """Holds the state of the consultation: the session, the running answer, the answer being looked at."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]
    BINDINGS = [
        Binding("f1", "help", "帮助"),
        Binding("f2", "new", "新会诊", tooltip="开始新会诊，清空当前对话"),
        Binding("f3", "evidence", "资料", tooltip="展开或收起资料原文"),
        Binding("f4", "task", "任务", tooltip="换任务：知识问答、循证诊断、治疗推荐"),
        Binding("f5", "again", "重答", tooltip="把最后一个问题再问一遍；模型没有打开时重试"),
        # Priority, because TextArea has a binding of its own on F6.
        Binding("f6", "mode", "模式", tooltip="换模式：摘录、依据、自由", priority=True),
        Binding("ctrl+q", "app.quit", "退出", priority=True, key_display="^Q"),
        Binding("escape", "stop", "停止", tooltip="停止正在写的回答"),
        Binding("ctrl+o", "copy", "复制", tooltip="复制当前回答和出处", key_display="^O"),
        Binding("pageup", "scroll(-1)", "向上翻页", show=False, priority=True),
        Binding("pagedown", "scroll(1)", "向下翻页", show=False, priority=True),
        Binding("ctrl+up", "select(-1)", "看上一个回答的资料", show=False, priority=True),
        Binding("ctrl+down", "select(1)", "看下一个回答的资料", show=False, priority=True),
    ]

    def __init__(self, opener: Opener, task: Task, mode: Mode | None) -> None:
        super().__init__()
        self._opener = opener
        self.chosen_task, self.chosen_mode = task, mode or Mode.QUOTE
        self._mode_is_default = mode is None
        self.session: Session | None = None
        self.load_failed = False
        self.running: AnswerTurn | None = None
        self.current: AnswerTurn | None = None
        self._renew_after_stop = False
        self._buffer = TextBuffer()
        self._flushed_at = 0.0

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
        self.call_after_refresh(self._load)

    # Loading

    @work(thread=True, exit_on_error=False)
    def _load(self) -> None:
        try:
            session = self._opener.open()
        except Exception as error:  # whatever it is, the user sees it in the panel, not as a traceback
            self.post_message(SessionFailed(str(error) or type(error).__name__))
        else:
            self.post_message(SessionReady(session))

    def on_session_ready(self, message: SessionReady) -> None:
        """Show what the model is and send what waits."""
        self.session = session = message.session
        self.load_failed = False
        for failure in self.query(LoadFailure):
            failure.remove()
        self.query_one(Welcome).show_notes(session.model.notes)
        self.query_one(Banner).show(demonstration=session.model.demonstration)
        if self._mode_is_default:
            self._set_mode(session.consultation.mode or self.chosen_mode)
        model = session.model
        self.query_one(HintLine).show_model(f"{model.name} · {model.quant}")
        if self.running is not None:
            self._start(session.consultation, self.running)
        self.show_hint()

    async def on_session_failed(self, message: SessionFailed) -> None:
        """Show why, keep what was typed, and offer to try again."""
        self.load_failed = True
        self.query_one(Welcome).display = False
        await self.query_one(Transcript).mount(LoadFailure(message.cause))
        if self.running is not None:
            self.running.cancel()
            self._ended()
        self.show_hint()

    # Asking

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
            self.query_one(Composer).clear()
            self.ask(message.text)

    def ask(self, question: str) -> None:
        self.query_one(Welcome).display = False
        turn = self.query_one(Transcript).add(question, self.chosen_task, self.chosen_mode)
        self.running = turn
        self._look_at(turn)
        if self.session is not None:
            self._start(self.session.consultation, turn)
        self.show_hint()

    def _start(self, consultation: Consultation, turn: AnswerTurn) -> None:
        consultation.task, consultation.mode = turn.asked_task, turn.mode
        turn.begin()
        self._buffer = TextBuffer()  # text of an earlier turn that is still under way stays in its own
        self._answer(consultation, turn, self._buffer)

    @work(thread=True, group="answer")
    def _answer(self, consultation: Consultation, turn: AnswerTurn, buffer: TextBuffer) -> None:
        answer(consultation, turn, buffer, self.post_message)

    def on_text_arrived(self, message: TextArrived) -> None:
        """Show new text now, or at the end of the current batch."""
        if message.turn is self.running:
            wait = self._flushed_at + BATCH_SECONDS - monotonic()
            if wait > 0:
                self.set_timer(wait, self._flush)
            else:
                self._flush()

    def on_turn_progress(self, message: TurnProgress) -> None:
        """Show one event; late ones of a turn that is gone are dropped."""
        if message.turn is self.running:
            self._flush()
            self._apply(message.turn, message.event)

    def _flush(self) -> None:
        self._flushed_at = monotonic()
        text = self._buffer.take()
        if text and self.running is not None:
            self._apply(self.running, Delta(text))

    def _apply(self, turn: AnswerTurn, event: Event) -> None:
        turn.apply(event)
        if turn is self.current:
            self._show_evidence(turn)
        if turn.ended:
            self._ended()

    def on_turn_broken(self, message: TurnBroken) -> None:
        """Keep and label what there is."""
        if message.turn is self.running:
            self._flush()
            message.turn.break_off(message.cause)
            self._ended()

    def _ended(self) -> None:
        self.running = None
        if self._renew_after_stop:
            self._renew()
        self.show_hint()

    def _tick(self) -> None:
        if self.running is not None:
            self.running.refresh_activity()

    # Keys

    def action_stop(self) -> None:
        """Esc: stop the running answer, or take back a question that waits for the model."""
        turn = self.running
        if turn is None:
            self.query_one(Composer).focus()
        elif self.session is None:
            turn.cancel()
            composer = self.query_one(Composer)
            if not composer.text:
                composer.replace_text(turn.question)
            self._ended()
        else:
            self.session.consultation.stop()
            self.show_hint("正在停止…")

    @work
    async def action_new(self) -> None:
        """F2: forget the conversation; asks first while an answer is running."""
        if self.running is not None and self.session is not None:
            question = "正在回答。停止并开始新会诊吗？\n当前对话不会保存。"
            if not await self.app.push_screen_wait(ConfirmScreen(question, "开始新会诊")):
                return
        if self.running is None:
            self._renew()
        else:
            self._renew_after_stop = True
            self.action_stop()

    def _renew(self) -> None:
        self._renew_after_stop = False
        if self.session is not None:
            self.session.consultation.reset()
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
            for failure in self.query(LoadFailure):
                failure.remove()
            self.query_one(Welcome).display = not self.query(AnswerTurn)
            self._load()
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
        rows = [
            (self.app.get_key_display(replace(binding, key_display=None)), binding.tooltip or binding.description)
            for binding in bindings
            if isinstance(binding, Binding) and binding.description
        ]
        model = self.session.model if self.session else None
        line = f"{model.name}（{model.architecture}，{model.quant}，{model.size_bytes / 1e6:.0f} MB）" if model else "还没有加载"
        self.app.push_screen(HelpScreen(rows, line))

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
        self.query_one(EvidencePanel).show(turn.passages, turn.cited, asked=turn.ended or bool(turn.passages))

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
        elif self.session is None:
            text = "正在加载模型，加载好后自动发送 · Esc 取消" if self.running else "正在加载模型，可以先输入"
        elif self.running is not None:
            text = "正在回答 · Esc 停止"
        else:
            text = f"{self.chosen_mode.label}：{MODE_MEANING[self.chosen_mode]} · Enter 发送 · Ctrl+J 换行"
            warning = self.chosen_mode is Mode.FREE
        self.query_one(HintLine).say(text, warning=warning)
