"""The consultation screen with a scripted consultation: asking, stopping, waiting, failing."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.tui.scripted import SENTENCES, TEXT, Script, app_of, hint, send, shown, until
from tui.consultation import Mode, Task
from tui.engine import EngineError
from tui.screens.answering import TextBuffer
from tui.widgets.composer import Composer
from tui.widgets.transcript import Transcript

SIZE = (120, 36)
PROJECT = Path(__file__).parent.parent.parent


async def test_a_question_is_answered_with_its_label_evidence_and_danger_signs() -> None:
    app, opener = app_of()
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "手足口病怎么护理")
        await until(lambda: opener.consultation.asked and app.consultation_screen.running is None)
        await pilot.pause()
        text = shown(app)
        assert opener.consultation.asked == [("手足口病怎么护理", Task.KNOWLEDGE, Mode.QUOTE)]
        assert "AI生成·供医务人员参考·摘录" in text
        assert "".join(SENTENCES[0].split()) in text
        assert "危险信号：出现任何一项立即转诊" in text
        assert "持续高热不退" in text
        assert "[1]手足口病·家庭护理已引用" in text
        assert "《手足口病诊疗指南》2018" in text
        assert "62词元" in text
        assert "首字0.8秒" in text
        assert "演示模型·不可用于诊疗" in text
        assert not app.screen.query_one(Composer).text
        assert app.consultation_screen.query_one(Transcript).answers[0].text == TEXT


async def test_text_is_on_the_screen_before_the_answer_is_finished_and_stop_keeps_and_labels_it() -> None:
    hold = threading.Event()
    app, _ = app_of(Script(hold=hold, text=TEXT[:40]))
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "问题")
        await until(lambda: app.consultation_screen.running and app.consultation_screen.running.text == TEXT[:40])
        turn = app.consultation_screen.running
        assert turn is not None
        assert not turn.ended
        await pilot.press("escape")
        await until(lambda: app.consultation_screen.running is None, seconds=2)
        await pilot.pause()
        assert turn.text == TEXT[:40]
        assert "已停止·未完成，请勿据此用药" in shown(app)
        assert turn.has_class("-unfinished")


@pytest.mark.parametrize(
    ("reason", "label"),
    [("length", "达到长度上限"), ("context", "上下文已满"), ("error", "出错中断"), ("stopped", "已停止")],
)
async def test_every_unfinished_answer_says_so(reason: str, label: str) -> None:
    app, _ = app_of(Script(stop_reason=reason, error="原因甲。" if reason == "error" else None))  # type: ignore[arg-type]
    async with app.run_test(size=(80, 24)) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "问题")
        await until(lambda: app.consultation_screen.query_one(Transcript).answers[0].ended)
        await pilot.pause()
        assert label in shown(app)
        assert "未完成，请勿据此用药" in shown(app)
        assert ("原因甲。" in shown(app)) == (reason == "error")


async def test_a_crash_keeps_the_partial_answer_and_the_next_question_works() -> None:
    app, opener = app_of(Script(text=TEXT[:30], raises=EngineError("模型进程意外结束。")), Script())
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "问题一")
        await until(lambda: app.consultation_screen.query_one(Transcript).answers[0].ended)
        await pilot.pause()
        first = app.consultation_screen.query_one(Transcript).answers[0]
        assert first.text == TEXT[:30]
        assert "模型进程意外结束" in shown(app)
        assert "未完成，请勿据此用药" in shown(app)
        await send(pilot, "问题二")
        await until(lambda: len(opener.consultation.asked) == 2 and app.consultation_screen.running is None)
        assert app.consultation_screen.query_one(Transcript).answers[1].text == TEXT


async def test_unsupported_sentences_are_marked_in_words() -> None:
    app, _ = app_of(Script(unsupported=(SENTENCES[1],)))
    async with app.run_test(size=(100, 30)) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "问题")
        await until(lambda: app.consultation_screen.query_one(Transcript).answers[0].ended)
        await pilot.pause()
        assert "煮沸消毒15分钟。（资料未支持）" in shown(app)
        assert shown(app).count("（资料未支持）") == 1


async def test_empty_input_is_not_sent_and_newline_does_not_send() -> None:
    app, opener = app_of()
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        composer = app.screen.query_one(Composer)
        await pilot.press("space", "enter")
        await until(lambda: "请先输入问题" in hint(app))
        composer.clear()
        await pilot.press("a", "ctrl+j", "b")
        assert composer.text == "a\nb"
        assert opener.consultation.asked == []
        await pilot.press("enter")
        await until(lambda: opener.consultation.asked)
        assert opener.consultation.asked[0][0] == "a\nb"


async def test_the_composer_grows_to_six_lines_and_no_further() -> None:
    app, _ = app_of()
    async with app.run_test(size=SIZE) as pilot:
        composer = app.screen.query_one(Composer)
        heights = []
        for _ in range(9):
            await pilot.pause()
            heights.append(composer.size.height)
            await pilot.press("ctrl+j")
        assert heights == [2, 2, 3, 4, 5, 6, 6, 6, 6]


async def test_a_question_typed_while_loading_waits_and_escape_takes_it_back() -> None:
    gate = threading.Event()
    app, opener = app_of(gate=gate)
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "先输入的问题")
        await until(lambda: app.consultation_screen.running is not None)
        assert "加载好后自动发送" in hint(app)
        await pilot.press("escape")
        await until(lambda: app.consultation_screen.running is None)
        assert app.screen.query_one(Composer).text == "先输入的问题"
        await pilot.press("enter")
        await until(lambda: app.consultation_screen.running is not None)
        assert opener.consultation.asked == []
        gate.set()
        await until(lambda: opener.consultation.asked and app.consultation_screen.running is None)
        assert [asked[0] for asked in opener.consultation.asked] == ["先输入的问题"]


async def test_a_second_question_waits_in_the_composer_while_one_is_answered() -> None:
    hold = threading.Event()
    app, opener = app_of(Script(hold=hold))
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "一")
        await until(lambda: opener.consultation.asked)
        await send(pilot, "二")
        await until(lambda: "Esc 停止后再发送" in hint(app))
        assert app.screen.query_one(Composer).text == "二"
        hold.set()
        await until(lambda: app.consultation_screen.running is None)
        assert len(opener.consultation.asked) == 1


async def test_load_failure_shows_cause_and_remedy_and_can_be_retried() -> None:
    cause = "模型文件不完整，缺少 12 MB。请重新复制这个文件。"
    app, opener = app_of(failures=[EngineError(cause)])
    async with app.run_test(size=(80, 24)) as pilot:
        await until(lambda: app.consultation_screen.load_failed)
        await pilot.pause()
        assert "模型没有打开" in shown(app)
        assert "缺少12MB。请重新复制这个文件。" in shown(app)
        await send(pilot, "问题")
        await until(lambda: "不能发送" in hint(app))
        assert app.screen.query_one(Composer).text == "问题"
        await pilot.press("f5")
        await until(lambda: app.consultation_screen.opened)
        await pilot.pause()
        assert "模型没有打开" not in shown(app)
        await pilot.press("enter")
        await until(lambda: opener.consultation.asked)


async def test_a_waiting_question_comes_back_when_loading_fails() -> None:
    gate = threading.Event()
    app, _ = app_of(failures=[EngineError("打不开。")], gate=gate)
    async with app.run_test(size=SIZE) as pilot:
        await send(pilot, "等待的问题")
        await until(lambda: app.consultation_screen.running)
        gate.set()
        await until(lambda: app.consultation_screen.load_failed and app.consultation_screen.running is None)
        assert app.screen.query_one(Composer).text == "等待的问题"


@pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
def test_the_terminal_gets_its_own_screen_back_when_the_app_is_told_to_end() -> None:
    main, side = pytest.importorskip("pty").openpty()
    code = "import sys; from tests.tui.scripted import app_of; a, _ = app_of(); a.run(); sys.exit(a.return_code)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, cwd=PROJECT)
    os.close(side)
    output = b""
    try:
        while "正在加载模型".encode() not in output and b"Enter" not in output:
            output += os.read(main, 65536)
        child.terminate()
        while chunk := _read(main):
            output += chunk
        assert child.wait(20) == 128 + signal.SIGTERM
        assert output.rindex(b"\x1b[?1049l") > output.rindex(b"\x1b[?1049h")
    finally:
        child.kill()
        child.wait()
        os.close(main)


@pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
@pytest.mark.parametrize("ignored", [False, True])
def test_an_app_whose_terminal_is_gone_ends(ignored: bool) -> None:
    """A closed window must not leave a spinning process behind, even one that was started with hang-ups ignored."""
    pty = pytest.importorskip("pty")
    code = "import sys; from tests.tui.scripted import app_of; a, _ = app_of(); a.run(); sys.exit(a.return_code)"
    child, main = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.chdir(PROJECT)
        os.execv(sys.executable, [sys.executable, "-c", code])
    output = b""
    settled = time.monotonic() + 2.0
    while time.monotonic() < settled:  # painted, and at rest
        if select.select([main], [], [], 0.1)[0]:
            output += os.read(main, 65536)
    assert b"Enter" in output
    os.close(main)
    deadline = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[0] == child


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""


def test_the_buffer_asks_for_one_message_at_a_time_and_loses_nothing() -> None:
    buffer = TextBuffer()
    assert [buffer.put(part) for part in "abc"] == [True, False, False]
    assert buffer.take() == "abc"
    assert buffer.take() == ""
    assert buffer.put("d")
