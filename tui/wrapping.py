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

_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_UNIT = (
    r"(?:(?:[kmnpμµ]?g|[mdμµ]?[lL]|[ckmμµ]?m|[nmμµ]?mol|[mkMμµ]?I?U|cmH[2₂]O|mmHg|kPa|kcal|kJ|CFU|bpm|SD|min|h|d|s|°C)"
    "(?![a-zA-Z])|[℃%％‰]|[十百千]?[万亿]?(?:国际)?单位|[十百千]?[万亿](?:IU|U)|"
    "毫摩尔|微摩尔|千卡|毫米汞柱|标准差|百分位|毫升|毫克|微克|公斤|千克|厘米|毫米|分升|克|升|米|斤|度|"
    "岁半|周岁|岁|个半月|个半小时|个月|个|月龄|周龄|日龄|月|周|天|日|小时|分钟|分|秒|年|"
    "次|滴|片|粒|颗|丸|袋|支|包|勺|匙|喷|揿|吸|贴|枚|倍|杯|口|顿|餐|瓶|剂|针|种|例|级|期|型|类|项|条|步|号|版|轮)"
    r"(?:/(?:\([^()\s]{1,8}\)|（[^（）\s]{1,8}）|[a-zA-Zμ]{1,4}|分钟?|小时|天|日|次|周|年|公斤|千克|片|袋))*"
    r"(?:(?<=m)[23²³])?(?:[或及]?以[上下内]|或更[多高]|左右|内|后|前)?"
)
# Letters run into a number are the name of what is measured and stay with it: 维生素D400国际单位.
_NUMBER = r"第?[<>≤≥＜＞≈±+\-]?\s?[A-Za-z]{0,12}\d+(?:[.,:/]\d+)*[万千百亿多余]?"
_TO = r"\s?(?:[-~～–—至到]|——)\s?(?:[不未]满|不到)?"
# The character after a bare number belongs to it, listed as a unit or not.
_QUANTITY = rf"{_NUMBER}(?:\s?{_UNIT})?(?:{_TO}{_NUMBER}(?:\s?{_UNIT})?){{0,2}}(?:(?<=\d)[{_HAN}])?"
_DIGITS = "[零一二三四五六七八九十百千万两半几½¼¾]{1,6}"
_SPELLED = rf"第?{_DIGITS}(?:{_UNIT})?(?:[至到～]{_DIGITS})?{_UNIT}"
_LETTER = rf"[^\s{_WIDE}{_OPENING}]"
# What looked like a quantity but runs on in Latin letters is a word: 5x10^9/L.
_ENDED = rf"(?:(?<=[{_WIDE}{_CLOSING}])|(?![^\s{_WIDE}{_OPENING}{_CLOSING}]))"
_WORD = rf"{_LETTER}+(?:(?<=[\d½¼¾])(?:\s?{_UNIT}|[{_HAN}]))?"
_CHUNK = re.compile(
    rf"[{_OPENING}]{{0,4}}(?:{_QUANTITY}{_ENDED}|{_SPELLED}|{_WORD}|[{_WIDE}])"
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
