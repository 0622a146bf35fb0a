"""What a free answer may say because a passage says it: wording by character pairs, every number with its unit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

from tui.library.words import bigrams, normalise

# Spellings of one unit, the first stands for all; what is not listed counts as it is written.
_UNITS = {
    spelling: group[0]
    for group in (
        ["mg", "毫克"], ["μg", "ug", "mcg", "微克"], ["g", "克"], ["kg", "公斤", "千克"], ["ml", "毫升"], ["l", "升"],
        ["mm", "毫米"], ["cm", "厘米"], ["m", "米"], ["°c", "度", "摄氏度"], ["iu", "国际单位"], ["单位", "u"], ["dl"],
        ["mmol"], ["kpa", "千帕"], ["mmhg"], ["kcal", "千卡"], ["%"], ["次"], ["个月", "月龄"], ["月"], ["岁", "周岁"],
        ["年"], ["周", "星期", "个星期"], ["天", "日", "d"], ["小时", "个小时", "h"], ["个半小时"], ["个半月"],
        ["分钟", "min"], ["分"], ["秒", "s"], ["片"], ["粒"], ["包"], ["袋"], ["滴"], ["支"], ["倍"], ["喷"], ["吸"],
        ["揿"], ["勺"], ["瓶"], ["颗"], ["丸"], ["剂"], ["枚"], ["贴"], ["杯"], ["针"], ["轮"],
    )
    for spelling in group
}  # fmt: skip
_ATOM = "|".join(
    # A unit of letters ends where the letters end: 5mg is not 5m.
    re.escape(unit) + ("(?![a-z])" if unit[-1].isascii() and unit[-1].isalpha() else "")
    for unit in sorted(_UNITS, key=len, reverse=True)
)
_HAN = "[\u3400-\u9fff]"
_PER = rf"(?:[/·]\(?(?:{_ATOM}|[a-z0-9]+|{_HAN})\)?)*"  # mg/kg, mg/(kg·d), 次/分
_UNIT = rf"(?:{_ATOM})半?{_PER}"
_DIGIT = {character: value for value, character in enumerate("〇一二三四五六七八九")} | {"零": 0, "两": 2}
_POWER = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "亿": 100_000_000}
_ONE = "[一二两三四五六七八九〇零]"
_CHINESE = f"(?:半|(?:{_ONE}|十)[一二两三四五六七八九〇零十百千万亿]*(?:点{_ONE}+)?)"
_ARABIC = r"\d+(?:\.\d+)?(?:[:/]\d+(?:\.\d+)?)*"  # also a ratio 1:1000, a fraction 1/3, a pressure 90/60
_TO = r"[~〜\-–—−、至到或]+"
_FIGURES = re.compile(
    # a name, not an amount: b12, h1n1, the telephone number 120
    r"(?P<word>[a-z]+-?\d[a-z0-9]*|(?<=[打拨叫])120)"
    rf"|百分之(?P<percent>{_CHINESE}|{_ARABIC})"
    rf"|(?P<parts>{_CHINESE}|\d+)分之(?P<share>{_CHINESE}|\d+)(?P<whole>{_UNIT}|{_HAN})?"
    rf"|(?P<arabic>{_ARABIC}(?:{_TO}{_ARABIC})*)"
    rf"(?:(?P<unit>{_UNIT})|(?P<power>[百千万亿]*)(?P<more>[多余来几]?)(?P<after>{_UNIT}|(?:[a-z%°μ]+|{_HAN}){_PER})?)"
    # 十分 means "very"
    rf"|(?P<chinese>{_CHINESE}(?:{_TO}{_CHINESE})*)(?P<some>[多余来几]?)(?P<counted>(?!分(?!钟)){_UNIT})"
    # without a known unit only what cannot be a word like 一般 or 百日咳
    rf"|(?P<large>(?:{_ONE}[十百千万亿]|十{_ONE})[一二两三四五六七八九〇零十百千万亿]*)(?P<noun>{_HAN}?)"
)
_LIST_MARK = re.compile(r"^[\s*#•\-]*(?:\d{1,2}[.．、)）](?!\d)|[(（]\d{1,2}[)）]|[①-⑳])")
_REFERENCE = re.compile(rf"[\[【]\d{{1,2}}[\]】](?!{_UNIT})|资料\d{{1,2}}(?!\d|\.|{_UNIT})")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SENTENCE = re.compile(r"[^。！？!?\n]+[。！？!?]*")
_SHARE = 0.6  # of a sentence's character pairs must stand in the passage
_SHORTEST = 6  # characters; less says nothing that needs support


def sentences(text: str) -> list[str]:
    """Split free text into sentences, without surrounding white space."""
    return [part.strip() for part in _SENTENCE.findall(text) if part.strip()]


def quantities(text: str) -> set[tuple[str, str]]:
    """All (number, unit) pairs of a text; a range 10～15mg/kg gives both of its ends.

    Numbers are plain decimals (5万 is 50000, 两 is 2) or ratios as written; the unit of a number with none of the
    known units is the word or character behind it, so that an unknown unit must be found as well.
    """
    plain = normalise(_THOUSANDS.sub("", _LIST_MARK.sub("", text))).replace("⁄", "/")
    found: set[tuple[str, str]] = set()
    for match in _FIGURES.finditer(_REFERENCE.sub("", plain)):
        part = match.groupdict(default="")
        if part["word"]:
            found.add((part["word"], ""))
        elif part["percent"]:
            found.update((value, "%") for value in _values(part["percent"]))
        elif part["parts"]:
            parts, shares, unit = _values(part["parts"]), list(_values(part["share"])), _canonical(part["whole"])
            found.update((f"{share}/{whole}", unit) for whole in parts for share in shares)
        else:
            numbers = part["arabic"] or part["chinese"] or part["large"]
            unit = _canonical(part["unit"] or part["after"] or part["counted"] or part["noun"])
            about = part["more"] or part["some"]  # 10多天 is more than 10天
            found.update((value, about + unit) for value in _values(numbers, part["power"]))
    return found


def unsupported(text: str, passages: Iterable[Sequence[str]], known: Iterable[str] = ()) -> tuple[str, ...]:
    """The sentences of a text that no single passage supports.

    `passages` are lists of sentences. A passage supports a sentence when it contains most of its character pairs and
    every number with its unit. `known` are fixed phrases that need no support.
    """
    sources = [
        (bigrams(normalise("".join(lines))), {figure for line in lines for figure in quantities(line)})
        for lines in passages
    ]
    fixed = {normalise(part) for phrase in known for part in sentences(phrase)}
    doubtful = []
    for sentence in sentences(text):
        pairs, numbers = bigrams(normalise(sentence)), quantities(sentence)
        if normalise(sentence) in fixed or (len(sentence) < _SHORTEST and not numbers):
            continue
        supported = any(numbers <= figures and len(pairs & words) >= _SHARE * len(pairs) for words, figures in sources)
        if not supported:
            doubtful.append(sentence)
    return tuple(doubtful)


def _canonical(unit: str) -> str:
    first, *per = re.split("[/·]", re.sub("[()]", "", unit))
    half = "半" if first.endswith("半") else ""  # 1岁半 is another age than 1岁
    first = first.removesuffix("半")
    return "/".join([_UNITS.get(first, first) + half, *("分钟" if u == "分" else _UNITS.get(u, u) for u in per)])


def _values(numbers: str, power: str = "") -> Iterator[str]:
    """The numbers of a range or list, each as a plain decimal; a ratio stays as it is written."""
    for number in re.split(_TO, numbers):
        if ":" in number or "/" in number:
            yield number + power
        elif number[0].isdecimal():
            yield _decimal(Decimal(number) * math.prod(_POWER[character] for character in power))
        else:
            yield from _chinese(number)


def _chinese(number: str) -> Iterator[str]:
    """二十四 is 24, 半 is 0.5, 一点五 is 1.5, 两三 (天) are 2 and 3, 二〇二二 is 2022."""
    if number == "半":
        yield "0.5"
    elif "点" in number:
        whole, _, rest = number.partition("点")
        for value in _chinese(whole):
            yield _decimal(Decimal(f"{value}.{''.join(str(_DIGIT[character]) for character in rest)}"))
    elif set(number) <= set(_DIGIT):
        digits = [str(_DIGIT[character]) for character in number]
        yield from digits if len(digits) == 2 and "0" not in digits else ["".join(digits)]
    elif re.search("[一二两三四五六七八九]{2}|[百千万亿][一二两三四五六七八九]$", number):
        yield number  # 五六百, 一百五: as it is written
    else:
        total = section = digit = 0
        for character in number:
            if character in _DIGIT:
                digit = _DIGIT[character]
            elif _POWER[character] < 10_000:
                section, digit = section + (digit or 1) * _POWER[character], 0
            else:
                total, section, digit = (total + section + digit) * _POWER[character], 0, 0
        yield str(total + section + digit)


def _decimal(value: Decimal) -> str:
    return f"{value.normalize():f}"
