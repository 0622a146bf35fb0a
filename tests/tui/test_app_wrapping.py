"""Line breaking: what stays together, what may not start a line, and that Textual really uses it."""

import random
import re
import time
from itertools import pairwise

import pytest
from rich.cells import cell_len
from textual.app import App, ComposeResult
from textual.widgets import Static, TextArea

from tests.tui.scripted import screen_text
from tui import wrapping
from tui.library import Library

CASE = "患儿 3岁2月，发热三天伴咳嗽、气促，无惊厥；体重 14 kg，布洛芬 5–10 mg/kg 口服，每 6～8 小时一次[1]。"
GOLDEN = {
    20: [
        "患儿 3岁2月，发热",
        "三天伴咳嗽、气促，无",
        "惊厥；体重 14 kg，布",
        "洛芬 5–10 mg/kg 口",
        "服，每 6～8 小时",
        "一次[1]。",
    ],
    34: [
        "患儿 3岁2月，发热三天伴咳嗽、气",
        "促，无惊厥；体重 14 kg，布洛芬",
        "5–10 mg/kg 口服，每 6～8 小时",
        "一次[1]。",
    ],
}
TOGETHER = [
    "14 kg", "5–10 mg/kg", "10～15mg/kg", "≥38.5℃", "39.2 ℃", "50次/分", "2岁", "<2岁", "6个月", "3 天", "1.5 ml",
    "20ml/kg", "0.9%", "10万单位", "24小时内", "5-10 mg/(kg·次)", "三天", "两到三周", "75ml/(kg·4h)", "90 %", "1/2片",
    "80毫克", "60 mmHg", "200 kcal/kg", "2～3滴", "1000 IU",
    "D400～800国际单位", "3月龄～3岁", "6个月～不满6岁", "2喷", "1勺", "1袋", "3万单位", "40万U", "28日龄", "36周龄",
    "0.5～1mmol/L", "38℃～39℃", "100μg", "½片", "20 cmH2O", "100亿CFU", "5枚", "2轮", "50次/分或以上", "90%及以上",
]  # fmt: skip
NEVER_FIRST = "，。、；：？！）》」』】〉〕”’…％,.;:?!)]"
NEVER_LAST = "（《「『【〈〔“‘(["


def lines(text: str, width: int) -> list[str]:
    cuts = [0, *wrapping.divide_line(text, width), len(text)]
    return [text[start:end].rstrip() for start, end in pairwise(cuts)]


@pytest.mark.parametrize("width", GOLDEN)
def test_golden(width: int) -> None:
    assert lines(CASE, width) == GOLDEN[width]


@pytest.mark.parametrize("quantity", TOGETHER)
def test_a_number_keeps_its_unit_at_every_width(quantity: str) -> None:
    text = f"体温升高的孩子每次口服{quantity}，观察精神和尿量，{quantity}后复查。"
    for width in range(cell_len(quantity) + 4, 60):
        shown = lines(text, width)
        assert sum(line.count(quantity) for line in shown) == 2, (width, shown)


def test_no_dose_of_any_card_is_split() -> None:
    """Every section with a number as the evidence panel shows it; a number may end a line only before punctuation."""
    units = "mg/kg|ml/kg|mg|ml|mm|cm|μg|g/L|g|IU|国际单位|微克|毫升|万单位|小时|分钟|次/分|个月|月龄|周龄|日龄"
    inside = re.compile(rf"\d[\d.]*\s?(?:{units})|[A-Z]\d+|\d\s?(?:个?[月岁天周日]龄?|mg|ml)?[～~–\-至]\D{{0,2}}\d")
    found = 0
    for card in Library.load().cards.values():
        for section in card.sections.values():
            text = "".join(section)
            doses = [range(match.start() + 1, match.end()) for match in inside.finditer(text)]
            found += len(doses)
            for width in range(20, 99) if re.search(r"\d", text) else ():
                for cut in wrapping.divide_line(text, width):
                    around = (card.id, width, text[max(0, cut - 12) : cut] + "|" + text[cut : cut + 8])
                    assert not any(cut in dose for dose in doses), around
                    assert not re.search(r"\d$", text[:cut].rstrip()) or text[cut] in "（《“‘", around
                    assert text[cut] not in "％%℃～", around
    assert found > 300  # or the pattern above means nothing


def test_punctuation_and_citations_do_not_start_a_line() -> None:
    text = "高热、咳嗽（干咳）；“气促”时，请立即转诊[1][2]！可以用《儿科学》核对：呼吸、心率……精神差？是的。" * 3
    for width in range(12, 70):
        for line in lines(text, width):
            assert not line.startswith(tuple(NEVER_FIRST)), (width, line)
            assert not re.match(r"\[\d", line), (width, line)
            assert not line.endswith(tuple(NEVER_LAST)), (width, line)


def test_every_line_fits_and_nothing_is_lost() -> None:
    alphabet = "患儿发热咳嗽，。（）“”[1]0123456789 mg/kg℃～岁天abcXYZ-  😀e\u0301　"
    source = random.Random(7)
    for _ in range(400):
        text = "".join(source.choice(alphabet) for _ in range(source.randrange(0, 120)))
        width = source.randrange(2, 50)
        cuts = wrapping.divide_line(text, width)
        assert cuts == sorted(set(cuts)), (text, width)
        assert all(0 < cut < len(text) for cut in cuts), (text, width)
        assert all(cell_len(line) <= width for line in lines(text, width)), (text, width)
        assert "".join(chunk for _, _, chunk in wrapping.chunks(text)) == text


@pytest.mark.parametrize("text", ["a" * 500, "发" * 500, "1" * 500, "！" * 500, "(" * 500, "一" * 500, "1:1/" * 125])
def test_hostile_runs_fit_and_cost_little(text: str) -> None:
    assert all(cell_len(line) <= 40 for line in lines(text, 40))
    start = time.perf_counter()
    wrapping.divide_line(text * 10, 40)
    assert time.perf_counter() - start < 10  # quadratic time would take minutes


async def test_textual_uses_it_in_static_text_and_in_the_text_area() -> None:
    """The contract with the private API: fails when an upgrade of Textual wraps by another way."""
    wrapping.install()

    class Probe(App[None]):
        CSS = "Static, TextArea { width: 34; padding: 0; border: none; } TextArea { height: 8; scrollbar-size: 0 0; }"

        def compose(self) -> ComposeResult:
            yield Static(CASE, markup=False)
            yield TextArea(CASE, soft_wrap=True, compact=True, show_line_numbers=False)

    async with Probe().run_test(size=(40, 20)) as pilot:
        await pilot.pause()
        rows = [row.rstrip() for row in screen_text(pilot.app)]
        assert rows[:4] == GOLDEN[34]
        area = pilot.app.query_one(TextArea)
        # The text area keeps a column free for the cursor and counts blanks at the end of a piece.
        shown = [part.rstrip() for part in area.wrapped_document.lines[0]]
        assert area.wrap_width in (33, 34)
        for quantity in ("14 kg", "5–10 mg/kg", "6～8 小时", "一次[1]。"):
            assert any(quantity in part for part in shown), shown
        assert not any(part.startswith(tuple(NEVER_FIRST)) for part in shown), shown


def test_an_unknown_textual_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("textual._wrap.re_chunk")
    with pytest.raises(RuntimeError, match=r"textual==8\.2\.8"):
        wrapping.install()
