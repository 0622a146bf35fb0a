"""Search, prompt, engine and answer together; what reaches the screen is clean."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tui.consultation import (
    Answer,
    Consultation,
    Delta,
    Finished,
    Found,
    Mode,
    Reading,
    Task,
    sanitised,
)
from tui.engine.contract import ModelInfo, Prompts
from tui.engine.process import Engine
from tui.engine.quote import QuoteWeights
from tui.library import Library
from tui.library.cards import load_cards
from tui.library.support import quantities, unsupported
from tui.quoting import quote_spec

Finish = Callable[[Consultation, str], Answer]


class Scripted:
    """An engine that says what it is told and remembers what it was sent."""

    def __init__(self, text: str, demonstration: bool = False) -> None:
        self.info = ModelInfo("m", "qwen3", 1, 1, 2048, "F32", demonstration, Prompts.builtin(), False)
        self.text, self.requests, self.dropped = text, [], 0

    def poll_ready(self, _seconds: float) -> ModelInfo:
        return self.info

    def stop(self) -> None:
        pass

    def generate(self, request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.requests.append(request)
        for part in (self.text[:3], self.text[3:]):
            yield {"event": "delta", "text": part, "tokens": 1}
        yield {"event": "finished", "stop_reason": "eos", "tokens": 2, "dropped_turns": self.dropped, "pieces": []}


def scripted(library: Library, text: str, **options: Any) -> tuple[Consultation, Scripted]:
    engine = Scripted(text)
    return Consultation(engine, library, **options), engine  # type: ignore[arg-type]


def test_events_come_in_order_and_the_answer_is_what_was_shown(engine: Engine, library: Library) -> None:
    events = list(Consultation(engine, library).ask("孩子发烧怎么办"))
    assert isinstance(events[0], Found)
    assert isinstance(events[1], Reading)
    assert isinstance(events[-1], Finished)
    answer = events[-1].answer
    assert answer.text == "".join(event.text for event in events if isinstance(event, Delta))
    assert (answer.mode, answer.task, answer.stop_reason, answer.error) == (Mode.QUOTE, Task.KNOWLEDGE, "eos", None)
    assert events[0].passages == answer.passages
    assert answer.cards[0] == "fever"
    assert 0 < answer.first_token_seconds <= answer.seconds


def test_quote_answers_are_made_of_the_passages_and_phrases_alone(
    engine: Engine, library: Library, finish: Finish, prompts: dict[str, Any]
) -> None:
    phrases = Prompts.of(prompts).phrases
    consultation = Consultation(engine, library)
    for question in ("发烧怎么办", "拉肚子吃什么药", "那要去医院吗", "写一首诗", "你是谁"):
        answer = finish(consultation, question)
        allowed = {*phrases.openings, *phrases.closings, phrases.refusal, phrases.identity}
        allowed |= {f"根据{p.title}·{p.section}[{p.number}]：\n" for p in answer.passages}
        allowed |= {sentence + "\n" for p in answer.passages for sentence in p.sentences}
        assert {line + "\n" for line in answer.text.splitlines()} <= allowed
        assert bool(answer.cited) != (answer.refused or phrases.identity in answer.text)
        assert set(answer.cited) <= {p.number for p in answer.passages}


def test_what_is_sent_is_the_contract(library: Library, finish: Finish) -> None:
    consultation, engine = scripted(library, "好。", task=Task.TREATMENT, mode=Mode.GROUNDED)
    answer = finish(consultation, "发烧吃什么药")
    system, user = engine.requests[0]["messages"]
    builtin = Prompts.builtin()
    assert system["content"] == builtin.system_prompt + builtin.task_prompts["treatment"]
    passage = answer.passages[0]
    assert (passage.card_id, passage.section) == ("fever", "处理")
    first = "腋温38.5℃以上并且难受时，可用对乙酰氨基酚每次10～15mg/kg。"
    assert user["content"].startswith(f"资料\n[1]发热·处理：\n{first}\n")
    assert user["content"].endswith("问题：发烧吃什么药")
    assert "quote" not in engine.requests[0]
    consultation.mode = Mode.FREE
    finish(consultation, "然后呢")
    free = {"role": "system", "content": builtin.free_system_prompt + builtin.task_prompts["treatment"]}
    assert "资料" not in free["content"]  # what asks for passages that are not there makes a model refuse
    assert engine.requests[1]["messages"] == [
        free, user, {"role": "assistant", "content": "好。"}, {"role": "user", "content": "然后呢"}
    ]  # fmt: skip
    consultation.reset()
    finish(consultation, "再来")
    assert len(engine.requests[2]["messages"]) == 2


def test_dropped_turns_leave_the_history(library: Library, finish: Finish) -> None:
    consultation, engine = scripted(library, "好。", mode=Mode.FREE)
    finish(consultation, "一")
    engine.dropped = 1
    finish(consultation, "二")
    finish(consultation, "三")
    assert [m["content"] for m in engine.requests[2]["messages"][1:]] == ["二", "好。", "三"]


def test_diagnosis_searches_with_the_last_three_questions(library: Library, finish: Finish) -> None:
    consultation, _ = scripted(library, "好。", task=Task.DIAGNOSIS)
    finish(consultation, "孩子一天拉很多次")
    assert "diarrhoea" in finish(consultation, "没有发烫").cards
    consultation.task = Task.KNOWLEDGE
    assert finish(consultation, "水痘").cards[0] == "chickenpox"


def test_default_mode_follows_the_model(library: Library) -> None:
    for demonstration, mode in ((True, Mode.QUOTE), (False, Mode.GROUNDED)):
        engine = Scripted("", demonstration)
        assert Consultation(engine, library).mode is mode  # type: ignore[arg-type]


def test_nothing_that_steers_a_terminal_comes_out(library: Library, finish: Finish) -> None:
    consultation, _ = scripted(library, "a\x1b[31m红\x07\u202e倒\x9b2J\u2066\r\n", mode=Mode.FREE)
    assert finish(consultation, "x").text == "a[31m红倒2J\n"
    assert sanitised("甲\t乙\n\x00\x7f\u200f\ud800") == "甲\t乙\n"


def test_unsupported_sentences_are_marked(library: Library, finish: Finish) -> None:
    text = (
        "您先别着急。\n根据发热·处理[1]：\n难受时可用对乙酰氨基酚每次10～15mg/kg。"
        "难受时可用对乙酰氨基酚每次20mg/kg。月亮绕着地球转。"
    )
    consultation, _ = scripted(library, text, mode=Mode.GROUNDED, task=Task.TREATMENT)
    answer = finish(consultation, "发烧吃什么药")
    assert answer.unsupported == ("难受时可用对乙酰氨基酚每次20mg/kg。", "月亮绕着地球转。")
    assert answer.cited == (1,)


def test_number_and_unit_must_stand_in_one_passage() -> None:
    passages = [("补锌每天20mg共10天。",), ("每次10～15mg/kg。",)]
    assert quantities("每次10～15mg/kg，隔4—6小时") == {("10", "mg/kg"), ("15", "mg/kg"), ("4", "小时"), ("6", "小时")}
    assert unsupported("补锌每天20mg共10天。", passages) == ()
    assert unsupported("补锌每天10mg共20天。", passages) == ("补锌每天10mg共20天。",)
    assert unsupported("补锌每天15mg/kg共10天。", passages) == ("补锌每天15mg/kg共10天。",)


@pytest.mark.parametrize(
    ("passage", "right", "wrong"),
    [
        ("一次口服5万单位。", "一次口服50000单位。", "一次口服20万单位。"),
        ("用1:1000溶液肌内注射。", "用1：1000溶液肌内注射。", "用1:100溶液肌内注射。"),
        ("每次吸入2喷，隔20秒。", "每次吸入两喷。", "每次吸入20喷。"),
        ("每次吃2勺米粉。", "每次吃2勺米粉。", "每次吃二十勺米粉。"),
        ("每次吃3样食物。", "每次吃3样食物。", "每次吃30样食物。"),
        ("孩子难受时每次0.5毫克口服。", "孩子难受时每次零点五mg口服。", "孩子难受时每次五毫克口服。"),
        ("每次半片口服。", "每次半片口服。", "每次一片口服。"),
        ("每天20mg/kg口服。", "每天20mg/kg口服。", "每天20mg口服。"),
        ("孩子难受时每次口服1/3片。", "孩子难受时每次口服三分之一片。", "孩子难受时每次口服2/3片。"),
        ("满1岁半接种疫苗。", "满一岁半接种疫苗。", "满1岁接种疫苗。"),
        ("血压低于90/60mmHg。", "血压低于90/60mmHg。", "血压低于120/80mmHg。"),
        ("观察半小时再走。", "观察半小时再走。", "观察一个半小时再走。"),
        ("每次5mg/次口服。", "每次5mg/次口服。", "每次5mg/日口服。"),
        ("每次用10片口服。", "每次用十片口服。", "每次用十几片口服。"),
        ("腹泻后慢慢给100ml补液盐溶液。", "2. 腹泻后慢慢给一百毫升补液盐溶液[1]。", "腹泻后慢慢给1000ml补液盐溶液。"),
    ],
)
def test_every_number_must_stand_in_the_passage(passage: str, right: str, wrong: str) -> None:
    assert unsupported(right, [(passage,)]) == ()
    assert unsupported(wrong, [(passage,)]) == (wrong,)


def test_words_that_begin_like_numbers_are_words() -> None:
    assert quantities("百日咳的孩子一般十分难受，四肢发凉，万一发绀就打120。") == {("120", "")}


def test_every_sentence_of_every_card_supports_itself() -> None:
    for card in load_cards().values():
        for sentences in card.sections.values():
            listed = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
            assert unsupported(listed, [sentences]) == ()


def test_stop_while_the_model_is_loading(big_gguf: Path, library: Library) -> None:
    with Engine.start(big_gguf, threads=1) as engine:
        consultation = Consultation(engine, library)
        begin = 0.0
        for event in consultation.ask("发烧"):
            if isinstance(event, Found):
                begin = time.monotonic()
                threading.Timer(0.01, consultation.stop).start()
        assert time.monotonic() - begin < 5  # a guard against hanging, not a speed claim
        assert isinstance(event, Finished)
        assert event.answer.stop_reason == "stopped"


def test_dead_engine_is_an_answer_with_an_error_and_the_next_one_works(
    engine: Engine, library: Library, finish: Finish
) -> None:
    consultation = Consultation(engine, library)
    stream = consultation.ask("发烧")
    next(stream)
    next(stream)
    engine._child.process.kill()
    *_, last = stream
    assert isinstance(last, Finished)
    assert last.answer.stop_reason in ("error", "eos")  # the tiny model may have finished before the kill
    if last.answer.error:
        assert "重新提问" in last.answer.error
    assert finish(consultation, "发烧").stop_reason == "eos"


def test_wrong_use_is_refused(library: Library) -> None:
    consultation, _ = scripted(library, "好。")
    with pytest.raises(ValueError, match="empty"):
        next(consultation.ask(" \x1b "))
    stream = consultation.ask("发烧")
    next(stream)
    with pytest.raises(RuntimeError, match="still running"):
        next(consultation.ask("发烧"))


def test_quote_prior_follows_search_score_and_confidence(library: Library) -> None:
    prompts = Prompts.builtin()
    found = library.search("孩子水痘怎么办")
    spec = quote_spec(prompts, found, "孩子水痘怎么办", QuoteWeights())
    weights = [passage.weight for passage in spec.passages]
    assert weights == sorted(weights, reverse=True)
    sure = found.confidence**4
    unsure = (1 - found.confidence) ** 4
    assert spec.refusal_weight == pytest.approx(unsure / (sure + unsure))
    assert spec.identity is None
    assert quote_spec(prompts, found, "你是谁？", QuoteWeights()).identity == prompts.phrases.identity
    assert quote_spec(prompts, found, "给我开点药", QuoteWeights()).identity == prompts.phrases.prescription


@pytest.mark.parametrize(
    ("question", "phrase"),
    [
        ("你是真人吗", "identity"),
        ("你不会是机器人吧", "identity"),
        ("给我开三天的抗生素", "prescription"),
        ("帮我写个处方", "prescription"),
        ("给娃开瓶止咳药水", "prescription"),
        ("发烧能给孩子开空调吗", ""),
        ("医生给孩子开了阿莫西林，过敏怎么办", ""),
        ("孩子吞了机器人的纽扣电池", ""),
        ("处方药和非处方药怎么放", ""),
    ],
)
def test_who_asks_for_what_the_app_is_not(library: Library, question: str, phrase: str) -> None:
    prompts = Prompts.builtin()
    spec = quote_spec(prompts, library.search(question), question, QuoteWeights())
    assert spec.identity == (getattr(prompts.phrases, phrase) if phrase else None)
