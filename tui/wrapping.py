"""Line breaking for Chinese clinical text.

Textual and Rich break lines at spaces only. Chinese has none, and a dose such as ``14 kg`` has one in the
worst place. :func:`install` replaces the two private helpers that every widget goes through:
``textual.content.divide_line`` (all static text) and ``textual._wrap.re_chunk`` (the text area), so that

* a line may break between any two wide characters;
* a number stays with its unit, also in a range and with a space (``10～15 mg/kg``, ``3 天``);
* a line starts with no closing punctuation and no citation mark, and ends with no opening punctuation.

Both helpers are private API of a pinned Textual; ``tests/tui/test_app_wrapping.py`` guards them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import textual._wrap
import textual.content
from rich.cells import cell_len, chop_cells

_OPENING = re.escape("（《「『【〈〔“‘([{")
_CLOSING = re.escape("，。、；：？！）》」』】〉〕”’…—～·％%℃°,.;:?!)]}")
_WIDE = "\u2e80-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"

_UNIT = (
    r"(?:(?:[kmμµ]?g|[mdμµ]?[lL]|[ckm]?m|kPa|mmHg|mmol|μmol|IU|U|h|d|min|kcal|kJ|bpm|°C)(?![a-zA-Z])|(?:[℃%％]|"
    "万?国际单位|万?单位|毫摩尔|微摩尔|千卡|毫米汞柱|"
    "毫升|毫克|微克|公斤|千克|厘米|毫米|分升|克|升|米|斤|度|"
    "岁半|周岁|岁|个半月|个月|个|月龄|月|周|天|日|小时|分钟|分|秒|年|"
    "次|滴|片|粒|袋|支|包|勺|倍|杯|口|顿|餐|瓶|剂|针|种|例|级|期|型|类|项|条|步|号|版))"
    r"(?:/(?:\([^()\s]{1,8}\)|（[^（）\s]{1,8}）|[a-zA-Zμ]{1,4}|分钟?|小时|天|日|次|周|年|公斤|千克|片|袋))*"
    r"(?:\d?[²³])?(?:以上|以下|以内|左右|内|后|前)?"
)
_NUMBER = r"第?[<>≤≥＜＞≈±+\-]?\s?\d+(?:[.,:/]\d+)*[万千百亿多余]?"
_QUANTITY = rf"{_NUMBER}(?:\s?(?:[-~～–—至到]|——)\s?{_NUMBER})?\s?{_UNIT}"
_DIGITS = "[零一二三四五六七八九十百千万两半几]{1,6}"
_SPELLED = rf"第?{_DIGITS}(?:[至到～]{_DIGITS})?{_UNIT}"
_LETTER = rf"[^\s{_WIDE}{_OPENING}]"
_WORD = rf"{_LETTER}+?(?<=\d)\s?{_UNIT}(?![^\s{_WIDE}{_OPENING}{_CLOSING}])|{_LETTER}+"
_CHUNK = re.compile(
    rf"[{_OPENING}]{{0,4}}(?:{_QUANTITY}|{_SPELLED}|{_WORD}|[{_WIDE}])"
    rf"(?:[{_CLOSING}]|\[\d{{1,2}}\])*\s*|\s+|\S\s*"
)


def chunks(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield ``(start, end, text)`` of each unbreakable piece of a line, in order and without gaps."""
    position = 0
    while (match := _CHUNK.match(text, position)) is not None:
        yield match.start(), match.end(), match.group()
        position = match.end()


def divide_line(text: str, width: int, fold: bool = True) -> list[int]:
    """Return the character offsets where ``text`` breaks to fit ``width`` cells.

    Same signature and meaning as ``rich._wrap.divide_line``; a piece wider than a whole line is folded
    between characters when ``fold`` is set, otherwise it overflows.
    """
    breaks: list[int] = []
    used = 0
    for start, _end, chunk in chunks(text):
        needed = cell_len(chunk.rstrip())
        if used + needed <= width:
            used += cell_len(chunk)
        elif needed > width and fold:
            offset = start
            for index, line in enumerate(chop_cells(chunk, width)):
                if offset and (index or used):
                    breaks.append(offset)
                offset += len(line)
                used = cell_len(line)
        else:
            if start:
                breaks.append(start)
            used = cell_len(chunk)
    return breaks


def install() -> None:
    """Replace Textual's two line-breaking helpers; calling it again changes nothing.

    Raises:
        RuntimeError: this Textual no longer has the helpers, so doses could be split from their units.
    """
    if not hasattr(textual.content, "divide_line") or not hasattr(textual._wrap, "re_chunk"):
        raise RuntimeError("This version of Textual wraps lines differently; install textual==8.2.8.")
    textual.content.divide_line = divide_line  # pyright: ignore[reportPrivateImportUsage]
    textual._wrap.re_chunk = _CHUNK
