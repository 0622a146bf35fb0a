"""The section classifier against a computation by hand, and what it must be good for."""

from __future__ import annotations

import math

import pytest

from tui.library import Library
from tui.library.intent import SectionIntent


def test_probabilities_equal_naive_bayes_by_hand() -> None:
    intent = SectionIntent([("处理", "药"), ("处理", "药"), ("预防", "苗")], {"处理": [], "预防": []})
    # one known gram, the single character 药: counted 2 in 处理 (2 examples), 0 in 预防 (1 example), smoothing 0.3
    spread = 0.3 * 2
    everywhere = 3 + spread * 2
    treat = 0.5 * math.log((2 + 0.3) / (2 + spread) * everywhere / (2 + spread))
    prevent = 0.5 * math.log((0 + 0.3) / (1 + spread) * everywhere / (2 + spread))
    odds = math.exp((treat - prevent) / 4.0)
    assert intent("药") == pytest.approx({"处理": odds / (1 + odds), "预防": 1 / (1 + odds)})


def test_what_it_has_never_seen_says_nothing() -> None:
    assert SectionIntent([("处理", "药")], {"处理": [], "预防": []})("龘") == {}


@pytest.mark.parametrize(
    ("question", "section"),
    [("水痘能打疫苗不", "预防"), ("水痘吃什么药", "处理"), ("水痘啥时候送医院", "转诊"), ("水痘多久能好", "概述")],
)
def test_named_questions_find_their_section(question: str, section: str) -> None:
    assert Library.load().search(question).passages[0].section == section
