"""The app on a real engine: a tiny GGUF in a child process."""

import os
import signal
from pathlib import Path

import pytest

from tests.tui.scripted import shown, until
from tui.app import ConsultationApp
from tui.consultation import Mode, Task
from tui.engine.process import Engine
from tui.screens.opening import ModelOpener, Opened
from tui.widgets.composer import Composer
from tui.widgets.transcript import Transcript

CARDS = Path(__file__).parent / "cards"


def app_on(model: Path, mode: Mode | None = None) -> ConsultationApp:
    opener = ModelOpener(model, Task.KNOWLEDGE, mode, cards=CARDS, threads=1)
    return ConsultationApp(opener, mode=mode)


def opened_in(app: ConsultationApp) -> Opened:
    assert app.consultation_screen.opened is not None
    return app.consultation_screen.opened


async def test_a_demonstration_model_quotes_the_passages(tiny_gguf: Path) -> None:
    app = app_on(tiny_gguf)
    async with app.run_test(size=(120, 36)) as pilot:
        app.screen.query_one(Composer).insert("毛细支气管炎怎么护理")
        await pilot.press("enter")
        await until(lambda: app.consultation_screen.query_one(Transcript).answers, seconds=5)
        turn = app.consultation_screen.query_one(Transcript).answers[0]
        await until(lambda: turn.ended, seconds=60)
        await pilot.pause()
        assert turn.answer is not None
        assert (turn.answer.mode, turn.answer.stop_reason) == (Mode.QUOTE, "eos")
        assert turn.text == turn.answer.text
        reviewed = {sentence for passage in turn.passages for sentence in passage.sentences}
        quoted = [line for line in turn.text.splitlines() if line in reviewed]
        assert bool(quoted) == bool(turn.cited)
        assert turn.passages
        assert "演示模型·不可用于诊疗" in shown(app)
        assert turn.passages[0].title in shown(app)


async def test_stop_ends_a_running_answer_quickly(big_gguf: Path) -> None:
    app = app_on(big_gguf, Mode.FREE)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(lambda: app.consultation_screen.opened, seconds=60)
        app.consultation_screen.ask("孩子发热怎么办")
        turn = app.consultation_screen.running
        assert turn is not None
        await until(lambda: turn.text, seconds=60)
        await pilot.press("escape")
        await until(lambda: turn.ended, seconds=2)
        await pilot.pause()
        assert turn.answer is not None
        assert turn.answer.stop_reason == "stopped"
        assert "已停止·未完成，请勿据此用药" in shown(app)


@pytest.mark.skipif(os.name != "posix", reason="signals")
async def test_a_killed_engine_keeps_the_partial_answer_and_the_next_question_restarts_it(big_gguf: Path) -> None:
    app = app_on(big_gguf, Mode.FREE)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(lambda: app.consultation_screen.opened, seconds=60)
        app.consultation_screen.ask("孩子发热怎么办")
        turn = app.consultation_screen.running
        assert turn is not None
        await until(lambda: turn.text, seconds=60)
        engine = opened_in(app).consultation.engine
        assert isinstance(engine, Engine)
        first = engine.process_id
        os.kill(first, signal.SIGKILL)
        await until(lambda: turn.ended, seconds=10)
        await pilot.pause()
        assert turn.text
        assert "未完成，请勿据此用药" in shown(app)
        assert "内存不够" in shown(app)

        app.consultation_screen.ask("再问一次")
        second = app.consultation_screen.running
        assert second is not None
        await until(lambda: second.text, seconds=60)
        assert engine.process_id != first
        await pilot.press("escape")
        await until(lambda: second.ended, seconds=5)


async def test_a_file_that_is_no_model_is_explained(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\x00" * 100)
    app = app_on(broken)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(lambda: app.consultation_screen.load_failed, seconds=60)
        await pilot.pause()
        assert "模型没有打开" in shown(app)
        assert "broken.gguf" in shown(app) or "GGUF" in shown(app)


async def test_quitting_ends_the_child(tiny_gguf: Path) -> None:
    app = app_on(tiny_gguf)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(lambda: app.consultation_screen.opened, seconds=60)
        process = opened_in(app).consultation.engine.process_id
        await pilot.press("ctrl+q")
        await until(lambda: not app.is_running)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
