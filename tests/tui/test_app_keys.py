"""Keys and clicks: new consultation, task, mode, again, copy, help, examples, quitting."""

import threading

from textual.events import Key, Paste

from tests.tui.scripted import SENTENCES, Script, ScriptedConsultation, ScriptedOpener, app_of, hint, send, shown, until
from tui.app import ConsultationApp
from tui.consultation import Mode, Task
from tui.screens.confirm import ConfirmScreen
from tui.screens.help import HelpScreen
from tui.widgets.composer import Composer
from tui.widgets.transcript import Transcript
from tui.widgets.welcome import Welcome

SIZE = (120, 36)


async def test_new_consultation_clears_everything_and_asks_first_while_answering() -> None:
    hold = threading.Event()
    app, opener = app_of(Script(), Script(hold=hold))
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "一")
        await until(lambda: opener.consultation.asked and app.consultation_screen.running is None)
        await pilot.press("f2")
        await until(lambda: not app.consultation_screen.query_one(Transcript).answers)
        assert opener.consultation.resets == 1
        assert app.consultation_screen.query_one(Welcome).display
        await pilot.pause()
        assert "危险信号：" not in shown(app)

        await send(pilot, "二")
        await until(lambda: len(opener.consultation.asked) == 2)
        await pilot.press("f2")
        await until(lambda: isinstance(app.screen, ConfirmScreen))
        await pilot.press("escape")
        await until(lambda: app.screen is app.consultation_screen)
        assert app.consultation_screen.running is not None
        await pilot.press("f2")
        await until(lambda: isinstance(app.screen, ConfirmScreen))
        await pilot.press("right", "enter")
        await until(lambda: opener.consultation.resets == 2, seconds=3)
        await until(lambda: not app.consultation_screen.query_one(Transcript).answers)
        assert app.consultation_screen.running is None


async def test_enter_right_behind_fast_typing_sends_what_was_typed() -> None:
    app, opener = app_of()
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        for character in "发热\r两天":  # as the driver does it: without waiting for any of them
            key = "enter" if character == "\r" else character
            app.post_message(Key(key, character))
        await until(lambda: opener.consultation.asked)
        await pilot.pause()
        assert opener.consultation.asked[0][0] == "发热"
        assert app.screen.query_one(Composer).text == "两天"


async def test_a_line_end_in_a_paste_does_not_send() -> None:
    app, opener = app_of()
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        app.post_message(Paste("发热\r\n两天\r"))
        composer = app.screen.query_one(Composer)
        await until(lambda: composer.text)
        await pilot.pause()
        assert composer.text == "发热\n两天"
        assert opener.consultation.asked == []
        app.post_message(Key("enter", "\r"))
        await until(lambda: opener.consultation.asked)
        assert opener.consultation.asked[0][0] == "发热\n两天"


async def test_task_and_mode_by_key_and_click_apply_to_the_next_question() -> None:
    app, opener = app_of()
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await pilot.press("f4", "f6")
        assert (app.consultation_screen.chosen_task, app.consultation_screen.chosen_mode) == (
            Task.DIAGNOSIS,
            Mode.GROUNDED,
        )
        await send(pilot, "一")
        await until(lambda: opener.consultation.asked and app.consultation_screen.running is None)
        await pilot.click("#task", offset=(26, 0))
        await pilot.click("#mode", offset=(14, 0))
        await until(lambda: app.consultation_screen.chosen_mode is Mode.FREE)
        assert "未经核对" in hint(app)
        app.screen.query_one(Composer).focus()
        await send(pilot, "二")
        await until(lambda: len(opener.consultation.asked) == 2)
        assert [asked[1:] for asked in opener.consultation.asked] == [
            (Task.DIAGNOSIS, Mode.GROUNDED),
            (Task.TREATMENT, Mode.FREE),
        ]


async def test_the_default_mode_comes_from_the_model_unless_it_was_chosen() -> None:
    for requested, expected in ((None, Mode.GROUNDED), (Mode.FREE, Mode.FREE)):
        opener = ScriptedOpener(ScriptedConsultation(mode=Mode.GROUNDED), demonstration=False)
        app = ConsultationApp(opener, mode=requested)
        async with app.run_test(size=SIZE) as pilot:
            await until(lambda app=app: app.consultation_screen.opened)
            await pilot.pause()
            assert app.consultation_screen.chosen_mode is expected
            assert "仅供基层医务人员参考，不能代替医生诊断" in shown(app)
            assert "演示模型" not in shown(app)


async def test_regenerate_keeps_the_old_answer() -> None:
    app, opener = app_of(Script(text="旧回答。\n"), Script(text="新回答。\n"))
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await pilot.press("f5")
        assert "还没有问题" in hint(app)
        await send(pilot, "问题")
        await until(lambda: opener.consultation.asked and app.consultation_screen.running is None)
        await pilot.press("f5")
        await until(lambda: len(opener.consultation.asked) == 2 and app.consultation_screen.running is None)
        answers = app.consultation_screen.query_one(Transcript).answers
        assert [answer.text for answer in answers] == ["旧回答。\n", "新回答。\n"]
        assert opener.consultation.asked[1][0] == "问题"


async def test_copy_carries_label_ending_and_sources() -> None:
    app, _ = app_of(Script(stop_reason="stopped"))
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "问题")
        await until(lambda: app.consultation_screen.query_one(Transcript).answers[0].ended)
        await pilot.press("ctrl+o")
        assert app.clipboard.startswith("AI 生成 · 供医务人员参考")
        assert SENTENCES[0] in app.clipboard
        assert "未完成，请勿据此用药" in app.clipboard
        assert "《手足口病诊疗指南》2018，国家卫生健康委员会" in app.clipboard


async def test_help_lists_every_key_that_is_bound() -> None:
    app, _ = app_of()
    async with app.run_test(size=(100, 50)) as pilot:
        await pilot.press("f1")
        await until(lambda: isinstance(app.screen, HelpScreen))
        await pilot.pause()
        text = shown(app)
        for key in ("F1", "F2", "F3", "F4", "F5", "F6", "Ctrl+Q", "Esc", "Ctrl+O", "Enter", "Ctrl+J", "PgUp"):
            assert key in text
        assert "不能代替医生诊断" in text
        await pilot.press("escape")
        await until(lambda: app.screen is app.consultation_screen)


async def test_an_example_is_filled_in_with_its_task() -> None:
    app, opener = app_of()
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await pilot.press("tab")
        for _ in range(8):
            if app.focused is not None and app.focused.id is None:
                break
            await pilot.press("tab")
        await pilot.press("down", "down", "enter")
        await until(lambda: app.screen.query_one(Composer).text)
        assert "补液" in app.screen.query_one(Composer).text
        assert app.focused is app.screen.query_one(Composer)
        assert app.consultation_screen.chosen_task is Task.TREATMENT
        assert opener.consultation.asked == []


async def test_quit_asks_only_while_answering() -> None:
    hold = threading.Event()
    app, opener = app_of(Script(hold=hold))
    async with app.run_test(size=SIZE) as pilot:
        await until(lambda: app.consultation_screen.opened)
        await send(pilot, "问题")
        await until(lambda: opener.consultation.asked)
        await pilot.press("ctrl+q")
        await until(lambda: isinstance(app.screen, ConfirmScreen))
        await pilot.press("escape")
        await until(lambda: app.screen is app.consultation_screen)
        await pilot.press("escape")
        await until(lambda: app.consultation_screen.running is None)
        await pilot.press("ctrl+q")
        await until(lambda: not app.is_running)
    assert opener.closed


async def test_quitting_while_loading_does_not_wait_for_the_model() -> None:
    app, opener = app_of(gate=threading.Event())
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("ctrl+q")
        await until(lambda: not app.is_running)
    assert opener.closed
