"""What fits where: small terminals, no box lines, dangerous text, following the end."""

import dataclasses
import threading

import pytest
from textual.events import Paste
from textual.pilot import Pilot
from textual.widgets import Static

from tests.tui.scripted import TEXT, Script, ScriptedConsultation, ScriptedOpener, passage, screen_text, shown, until
from tui.app import ConsultationApp
from tui.consultation import Mode
from tui.widgets.composer import Composer
from tui.widgets.evidence import EvidencePanel, RedFlags
from tui.widgets.text import answer_content, cited_numbers, printable
from tui.widgets.transcript import Transcript

DANGEROUS = (
    "[bold red]粗体[/] [link=x] \x1b[31m红\x1b[0m \x1b]52;c;AAAA\x07 [@click=app.quit]点[/] \u202e反 " + "w" * 300
)


def app_of(*scripts: Script, mode: Mode | None = None, ascii_only: bool = False) -> ConsultationApp:
    opener = ScriptedOpener(ScriptedConsultation(list(scripts) or [Script()], mode=mode or Mode.QUOTE))
    return ConsultationApp(opener, mode=mode, ascii_only=ascii_only)


async def answered(pilot: Pilot[None], app: ConsultationApp, question: str = "手足口病怎么护理") -> None:
    await until(lambda: app.consultation_screen.opened)
    app.consultation_screen.ask(question)
    await until(lambda: app.consultation_screen.running is None)
    await pilot.pause()


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (109, 30), (110, 30), (160, 50)])
async def test_warning_mode_danger_signs_and_composer_are_visible_at_every_size(size: tuple[int, int]) -> None:
    app = app_of()
    async with app.run_test(size=size) as pilot:
        await answered(pilot, app)
        text = shown(app)
        assert "演示模型·不可用于诊疗" in text
        assert "[摘录]" in text
        assert "危险信号：出现任何一项立即转诊" in text
        assert "肢体抖动" in text
        assert "^Q退出" in text
        assert all(len(row) <= size[0] for row in screen_text(app))
        assert app.screen.query_one(Composer).region.bottom < size[1]
        assert app.screen.query_one(Transcript).region.height >= 8


async def test_evidence_moves_from_the_side_to_the_bottom_and_folds() -> None:
    app = app_of()
    async with app.run_test(size=(120, 36)) as pilot:
        await answered(pilot, app)
        panel, transcript = app.screen.query_one(EvidencePanel), app.screen.query_one(Transcript)
        assert panel.region.x == transcript.region.right
        assert "已引用" in shown(app)
        await pilot.resize_terminal(60, 20)
        await until(lambda: panel.region.y == transcript.region.bottom)
        assert "已引用" not in shown(app)
        await pilot.press("f3")
        await until(lambda: "已引用" in shown(app))
        assert transcript.region.height >= 3
        await pilot.resize_terminal(120, 36)
        await until(lambda: panel.region.x == transcript.region.right)


async def test_danger_signs_belong_to_the_cited_card_only_and_appear_while_it_is_written() -> None:
    hold = threading.Event()
    other = passage(2, title="发热")
    app = app_of(Script(passages=(passage(1), other), cited=(2,), text="根据发热·家庭护理[2]：\n", hold=hold))
    async with app.run_test(size=(120, 36)):
        await until(lambda: app.consultation_screen.opened)
        app.consultation_screen.ask("问题")
        flags = app.screen.query_one(RedFlags)
        await until(lambda: flags.display and "发热" in flags.text)
        assert app.consultation_screen.running is not None
        assert "手足口病" not in flags.text
        hold.set()
        await until(lambda: app.consultation_screen.running is None)


async def test_many_danger_signs_can_be_scrolled_where_they_do_not_fit() -> None:
    many = tuple(
        dataclasses.replace(
            passage(number, title=f"疾病{number}"), red_flags=tuple(f"危险情况{number}之{i}" for i in range(9))
        )
        for number in (1, 2, 3)
    )
    app = app_of(Script(passages=many, cited=(1, 2, 3)))
    async with app.run_test(size=(60, 20)) as pilot:
        await answered(pilot, app)
        flags = app.screen.query_one(RedFlags)
        assert flags.text.count("之") == 27
        assert flags.max_scroll_y > 0
        assert flags.show_vertical_scrollbar
        flags.scroll_end(animate=False)
        await until(lambda: "危险情况3之8" in shown(app))


async def test_an_answer_that_cites_nothing_shows_the_danger_signs_of_the_first_passage() -> None:
    hold = threading.Event()
    passages = (passage(1, title="发热"), passage(2))
    app = app_of(Script(passages=passages, cited=(), text="多喝水。\n", hold=hold), mode=Mode.GROUNDED)
    async with app.run_test(size=(120, 36)):
        await until(lambda: app.consultation_screen.opened)
        app.consultation_screen.ask("问题")
        flags = app.screen.query_one(RedFlags)
        await until(lambda: flags.display)
        assert app.consultation_screen.running is not None  # no need to wait for a slow model
        assert flags.text.splitlines()[1] == "发热"
        assert "手足口病" not in flags.text
        hold.set()
        await until(lambda: app.consultation_screen.running is None)
        assert "持续高热不退" in flags.text


async def test_a_quoted_answer_that_cites_nothing_shows_them_at_its_end_unless_it_is_a_refusal() -> None:
    app = app_of(Script(cited=(), text="多喝水。\n"), Script(cited=(), text="资料中没有相关内容。\n", refused=True))
    async with app.run_test(size=(120, 36)) as pilot:
        await answered(pilot, app)
        flags = app.screen.query_one(RedFlags)
        assert "手足口病" in flags.text
        await answered(pilot, app, "第二问")
        assert not flags.display


async def test_in_free_mode_a_number_in_brackets_is_no_citation() -> None:
    hold = threading.Event()
    app = app_of(Script(cited=(), text="多喝水[1]。\n", hold=hold), mode=Mode.FREE)
    async with app.run_test(size=(120, 36)) as pilot:
        await until(lambda: app.consultation_screen.opened)
        app.consultation_screen.ask("问题")
        flags = app.screen.query_one(RedFlags)
        turn = app.consultation_screen.running
        assert turn is not None
        for _ in range(2):
            await until(lambda: turn.text == "多喝水[1]。\n")
            await pilot.pause()
            assert "多喝水[1]。" in shown(app)
            assert turn.cited == ()
            assert not flags.display
            assert not app.screen.query_one(".turn-body", Static).visual.spans  # type: ignore[attr-defined]
            hold.set()
            await until(lambda: turn.ended)


async def test_no_citation_no_danger_box_and_no_passage_is_said() -> None:
    app = app_of(Script(passages=(), cited=(), text="资料中没有相关内容，请咨询医生。\n"))
    async with app.run_test(size=(120, 36)) as pilot:
        await answered(pilot, app)
        assert not app.screen.query_one(RedFlags).display
        assert "资料库里没有找到相关条目" in shown(app)


async def test_ascii_mode_draws_no_box_lines() -> None:
    app = app_of(ascii_only=True)
    async with app.run_test(size=(120, 36)) as pilot:
        await answered(pilot, app)
        await pilot.press("f1")
        await pilot.pause()
        drawn = {character for row in screen_text(app) for character in row}
        assert not {character for character in drawn if "\u2500" <= character <= "\u259f"}


@pytest.mark.parametrize("size", [(60, 20), (120, 36)])
async def test_dangerous_text_is_shown_as_text(size: tuple[int, int]) -> None:
    app = app_of(Script(text=printable(DANGEROUS) + "\n", error=DANGEROUS, stop_reason="error"))
    async with app.run_test(size=size) as pilot:
        await until(lambda: app.consultation_screen.opened)
        app.screen.query_one(Composer).insert(DANGEROUS)
        await pilot.press("enter")
        await until(lambda: app.consultation_screen.query_one(Transcript).answers)
        await until(lambda: app.consultation_screen.running is None)
        transcript = app.consultation_screen.query_one(Transcript)
        transcript.scroll_home(animate=False)
        await pilot.pause()
        rows = screen_text(app)
        assert any("[bold red]粗体[/]" in row for row in rows)
        assert not any(character < " " or character in "\x7f\u202e" for row in rows for character in row)
        assert app.is_running


async def test_pasted_escape_sequences_do_not_reach_the_text_area() -> None:
    app = app_of()
    async with app.run_test(size=(80, 24)) as pilot:
        composer = app.screen.query_one(Composer)
        app.post_message(Paste("发热\x1b[31m\r\n三天\x00"))
        await until(lambda: composer.text)
        await pilot.pause()
        assert composer.text == "发热[31m\n三天"


async def test_the_end_is_followed_only_while_the_user_is_there() -> None:
    hold = threading.Event()
    long = "孩子发热时多喝水，注意精神和尿量。\n" * 40
    app = app_of(Script(text=long), Script(text=TEXT + long, hold=hold))
    async with app.run_test(size=(80, 24)) as pilot:
        await answered(pilot, app)
        transcript = app.screen.query_one(Transcript)
        await until(lambda: transcript.max_scroll_y > 0 and transcript.scroll_y == transcript.max_scroll_y)
        app.consultation_screen.ask("第二个问题")
        await until(lambda: app.consultation_screen.running and app.consultation_screen.running.text.endswith(long))
        await until(lambda: transcript.scroll_y == transcript.max_scroll_y)
        await pilot.press("pageup")
        await until(lambda: transcript.scroll_y < transcript.max_scroll_y - 2)
        place, end = transcript.scroll_y, transcript.max_scroll_y
        hold.set()
        await until(lambda: app.consultation_screen.running is None)
        transcript.answers[-1].styles.height = 200  # more text below
        await until(lambda: transcript.max_scroll_y > end)
        await pilot.pause()
        assert transcript.scroll_y == place
        for _ in range(20):
            await pilot.press("pagedown")
        await until(lambda: transcript.scroll_y == transcript.max_scroll_y)
        assert transcript.follow


async def test_an_earlier_answer_can_be_looked_at_again() -> None:
    app = app_of(Script(), Script(passages=(passage(1, title="发热"),), text="根据发热·家庭护理[1]：\n"))
    async with app.run_test(size=(120, 36)) as pilot:
        await answered(pilot, app)
        await answered(pilot, app, "第二问")
        flags = app.screen.query_one(RedFlags)
        assert "发热" in flags.text
        await pilot.press("ctrl+up")
        await until(lambda: "手足口病" in flags.text)
        await pilot.press("ctrl+down")
        await until(lambda: "手足口病" not in flags.text)


def test_citations_count_only_for_known_passages() -> None:
    assert cited_numbers("见[2]和[1]、[2]、[7]，数组[99]", (1, 2, 3)) == (2, 1)


def test_answer_content_marks_repeated_and_unknown_sentences_once() -> None:
    content = answer_content("甲。\n乙[1]。\n丙。\n", (1,), ("丙。", "甲。", "没有这句。", "甲。"))
    assert content.plain == "甲。（资料未支持）\n乙[1]。\n丙。（资料未支持）"
    styled = {content.plain[span.start : span.end] for span in content.spans}
    assert styled == {"甲。", "丙。", "（资料未支持）", "[1]"}


def test_the_mark_stands_behind_the_sentence_it_means_and_behind_each_of_them() -> None:
    text = "孩子不可以吃阿司匹林。\n可以吃阿司匹林。\n多喝水。可以吃阿司匹林。\n"
    content = answer_content(text, (), ("可以吃阿司匹林。",))
    assert content.plain.split("\n") == [
        "孩子不可以吃阿司匹林。",
        "可以吃阿司匹林。（资料未支持）",
        "多喝水。可以吃阿司匹林。（资料未支持）",
    ]
    warned = [(span.start, span.end) for span in content.spans if span.style == "$warning"]
    assert [content.plain[start:end] for start, end in warned] == ["可以吃阿司匹林。"] * 2
    assert all(content.plain.startswith("（资料未支持）", end) for _, end in warned)


def test_the_line_that_only_cites_is_a_quiet_heading() -> None:
    content = answer_content("您先别着急。\n根据手足口病·家庭护理[1]：\n多喝水[1]。\n根据别的[7]：\n", (1,))
    styled = [(content.plain[span.start : span.end], span.style) for span in content.spans]
    assert styled == [
        ("根据手足口病·家庭护理[1]：", "$muted"),
        ("[1]", "bold $primary"),
        ("[1]", "bold $primary"),
    ]
