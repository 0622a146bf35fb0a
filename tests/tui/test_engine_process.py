"""The child process: answers, stops quickly, reuses its cache, and never takes the parent with it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny_model import TEMPLATE, write_model

from tui.engine.process import Engine, EngineError
from tui.engine.quote import QuotePassage, QuoteSpec, QuoteWeights

ROOT = Path(__file__).parents[2]
SENTENCES = ("发热的孩子要多喝水，少穿衣服，好好休息，不要用酒精擦身。\n", "三个月以下的婴儿发热要立即送到医院去看。\n")


def messages(*contents: str) -> list[dict[str, str]]:
    roles = ["system", *["user", "assistant"] * len(contents)]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def finished(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    *_, last = engine.generate(request)
    assert last["event"] == "finished"
    return last


def quote(**weights: float) -> dict[str, Any]:
    passage = QuotePassage("根据资料[1]：\n", 1.0, SENTENCES, (1.0, 1.0))
    return asdict(QuoteSpec((passage,), "没有。\n", 0.0, weights=QuoteWeights(**weights)))


@pytest.fixture(scope="module")
def big(big_gguf: Path) -> Iterator[Engine]:
    with Engine.start(big_gguf, context=16384, threads=1) as engine:
        engine.wait_ready(60)
        yield engine


def test_forced_tokens_are_decoded_in_one_batch(engine: Engine) -> None:
    # A prior that outweighs the random model: cite, first sentence, second sentence, end.
    request = {"messages": messages("s", "发热怎么办"), "quote": quote(prior=1e6, end=1e-3, closing=0.0)}
    event = finished(engine, request)
    assert event["text"] == "根据资料[1]：\n" + "".join(SENTENCES)
    assert [kind for kind, *_ in event["pieces"]] == ["cite", "sentence", "sentence", "end"]
    # Three branchings need the model: cite or refusal, which sentence first, go on or end.
    assert event["decode_calls"] == 3
    assert event["tokens"] > 40


def test_next_turn_evaluates_only_what_is_new(engine: Engine) -> None:
    one = finished(engine, {"messages": messages("s", "发热怎么办"), "quote": quote()})
    assert one["reused_tokens"] == 0
    two = finished(engine, {"messages": messages("s", "发热怎么办", one["text"], "还要做什么"), "quote": quote()})
    # All of the first turn but the pieces decided and never evaluated: at most the last piece and the end.
    assert two["reused_tokens"] >= one["prompt_tokens"] + one["tokens"] - 30
    same = finished(engine, {"messages": messages("s", "发热怎么办", one["text"], "还要做什么"), "quote": quote()})
    assert same["reused_tokens"] == same["prompt_tokens"] - 1
    assert same["text"] == two["text"]


def test_free_answer_is_found_in_the_cache_whatever_its_tokens(engine: Engine) -> None:
    sampling = {"temp": 1.5, "top_k": 50, "top_p": 1.0}
    request = {"messages": messages("s", "发热怎么办"), "max_tokens": 30, "sampling": sampling, "seed": 7}
    one = finished(engine, request)
    assert one["stop_reason"] in ("eos", "length")
    assert finished(engine, request)["text"] == one["text"]  # the seed decides
    two = finished(engine, {"messages": messages("s", "发热怎么办", one["text"], "好"), "max_tokens": 1})
    assert two["reused_tokens"] >= one["prompt_tokens"] + one["tokens"] - 1


def test_loop_ends_with_length(engine: Engine) -> None:
    from tui.engine.session import is_loop

    assert is_loop([9, 9, *[1, 2, 3] * 6])
    assert not is_loop([1, 2, 3] * 5)  # fifteen tokens: a list may repeat itself a little
    assert not is_loop(list(range(200)))
    assert finished(engine, {"messages": messages("s", "水"), "max_tokens": 5})["tokens"] <= 5


@pytest.mark.parametrize("when", ["reading", "delta"])
def test_stop_while_reading_and_while_writing(big: Engine, when: str) -> None:
    question = "发热的孩子要多喝水。" * (700 if when == "reading" else 3)
    sampling = {"temp": 2.0, "top_k": 400, "top_p": 1.0}
    stopped_at = None
    for event in big.generate({"messages": messages("s", question), "max_tokens": 4000, "sampling": sampling}):
        if event["event"] == when and stopped_at is None:
            stopped_at = time.monotonic()
            threading.Thread(target=big.stop).start()
    assert stopped_at is not None
    assert time.monotonic() - stopped_at < 5  # a guard against hanging, not a speed claim
    assert event["event"] == "finished"
    assert event["stop_reason"] == "stopped"
    # The cache holds exactly what was evaluated: the answer after a stop equals that of a fresh engine.
    after = finished(big, {"messages": messages("s", "水"), "max_tokens": 8, "sampling": {}})
    again = finished(big, {"messages": messages("s", "水"), "max_tokens": 8, "sampling": {}})
    assert after["text"] == again["text"]


def test_abandoned_answer_does_not_mix_with_the_next(big: Engine) -> None:
    stream = big.generate({"messages": messages("s", "发热的孩子要多喝水。" * 400)})
    next(stream)
    stream.close()
    assert finished(big, {"messages": messages("s", "水"), "max_tokens": 3})["tokens"] <= 3


def test_killed_child_is_an_error_and_the_next_question_works(engine: Engine) -> None:
    before = engine.process_id
    stream = engine.generate({"messages": messages("s", "发热的孩子要多喝水。" * 60), "max_tokens": 400})
    next(stream)
    os.kill(before, signal.SIGKILL)
    with pytest.raises(EngineError, match="内存"):
        list(stream)
    assert finished(engine, {"messages": messages("s", "水"), "max_tokens": 2})["stop_reason"] in ("eos", "length")
    assert engine.process_id != before


def test_crash_names_the_signal(engine: Engine) -> None:
    stream = engine.generate({"messages": messages("s", "发热的孩子要多喝水。" * 60), "max_tokens": 400})
    next(stream)
    os.kill(engine.process_id, signal.SIGABRT)
    with pytest.raises(EngineError, match="SIGABRT"):
        list(stream)


def test_child_killed_between_questions_is_replaced(engine: Engine) -> None:
    os.kill(engine.process_id, signal.SIGKILL)
    time.sleep(0.1)
    assert finished(engine, {"messages": messages("s", "水"), "max_tokens": 2})["event"] == "finished"


def test_child_ends_with_its_parent(tiny_gguf: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tui.engine.process import Engine\n"
        "engine = Engine.start(Path(sys.argv[1]), threads=1); engine.wait_ready(60)\n"
        "print(engine.process_id, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_gguf)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_refused_models_say_why(tmp_path: Path, tiny_gguf: Path, prompts: dict[str, Any]) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-100])
    for path, cause in (
        (cut, "损坏"),
        (tmp_path / "none.gguf", "找不到"),
        (write_model(tmp_path / "a.gguf", None, architecture="falcon"), "falcon"),
        (write_model(tmp_path / "b.gguf", None, template="{% if %}"), "对话模板"),
        (write_model(tmp_path / "c.gguf", None, edit=lambda w: w.add_uint32("pediatricsgpt.contract", 2)), "第 2 版"),
        (write_model(tmp_path / "d.gguf", None, edit=lambda w: w.add_uint32("pediatricsgpt.contract", 1)), "不完整"),
        (write_model(tmp_path / "e.gguf", None, architecture="nonesuch"), "nonesuch：unknown model architecture"),
        (write_model(tmp_path / "f.gguf", None, template="{{ messages[1].content }}"), "对话模板"),
        (write_model(tmp_path / "g.gguf", {**prompts, "passage_template": "$nope"}), "nope"),
        (write_model(tmp_path / "h.gguf", {**prompts, "question_template": "$passages"}), "丢掉"),
        (write_model(tmp_path / "i.gguf", None, template="{{ raise_exception('\x1b[31m红') }}"), r"（\[31m红）"),
    ):
        with Engine.start(path) as engine, pytest.raises(EngineError, match=cause):
            engine.wait_ready(60)


def test_foreign_model_works_with_builtin_prompts_and_a_note(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "f.gguf", None, edit=lambda w: (w.add_float32("general.sampling.temp", 0.25), w.add_uint32("x", 1))
    )
    with Engine.start(path, context=100_000, threads=1) as engine:
        info = engine.wait_ready(60)
        assert (info.foreign, info.demonstration, info.context) == (True, False, 2048)
        assert info.sampling == {"temp": 0.25, "top_p": 0.8, "top_k": 20}
        assert info.notes
        assert info.prompts.phrases.refusal.endswith("\n")
        assert finished(engine, {"messages": messages("s", "水"), "max_tokens": 3})["tokens"] <= 3


def test_template_without_a_system_role_gets_it_with_the_first_question(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    with Engine.start(write_model(tmp_path / "g.gguf", None, template=template), threads=1) as engine:
        assert any("系统" in note for note in engine.wait_ready(60).notes)
        one = finished(engine, {"messages": messages("s", "水"), "max_tokens": 3})
        two = finished(engine, {"messages": messages("s", "水", one["text"] or "水", "火"), "max_tokens": 3})
        assert two["event"] == "finished"
        assert two["error"] is None


def test_model_file_that_comes_back_is_loaded_again(tmp_path: Path, tiny_gguf: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(tiny_gguf, path)
    with Engine.start(path, threads=1) as engine:
        engine.wait_ready(60)
        os.kill(engine.process_id, signal.SIGKILL)
        engine._child.process.wait()
        path.unlink()
        for _ in range(2):
            with pytest.raises(EngineError, match="找不到"):
                finished(engine, {"messages": messages("s", "水")})
        shutil.copy(tiny_gguf, path)
        engine.wait_ready(60)  # as a consultation does before it asks
        assert finished(engine, {"messages": messages("s", "水"), "max_tokens": 2})["event"] == "finished"


def test_closed_engine_starts_no_other_child(tiny_gguf: Path) -> None:
    engine = Engine.start(tiny_gguf, threads=1)
    engine.wait_ready(60)
    engine.close()
    with pytest.raises(EngineError, match="关闭"):
        finished(engine, {"messages": messages("s", "水")})


def test_files_of_the_current_folder_are_not_imported(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("queue", "numpy", "jinja2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    with Engine.start(tiny_gguf, threads=1) as engine:
        assert engine.wait_ready(60).name == "tiny"


def test_idle_child_uses_no_processor_time(engine: Engine) -> None:
    finished(engine, {"messages": messages("s", "水"), "max_tokens": 5})
    time.sleep(0.5)

    def used() -> int:
        fields = Path(f"/proc/{engine.process_id}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])  # user and system time in ticks of 10 ms

    before = used()
    time.sleep(2)
    assert used() - before <= 4


def test_answer_cut_by_the_context_is_not_finished(engine: Engine) -> None:
    lines = tuple(
        f"{letter}疱疹性咽峡炎的孩子痛得不肯吃东西，眼泪鼻涕都流下来了，夜里也睡不安稳。\n"
        for letter in "甲乙丙丁戊己庚辛"
    )
    spec = asdict(
        QuoteSpec(
            (QuotePassage("根据资料[1]：\n", 1.0, lines, (1.0,) * 8),), "没有。\n", 0.0,
            weights=QuoteWeights(prior=1e6, end=1e-9, closing=0.0),
        )
    )  # fmt: skip
    whole = finished(engine, {"messages": messages("s", "发热"), "quote": spec})
    assert (whole["stop_reason"], [kind for kind, *_ in whole["pieces"]].count("sentence")) == ("eos", 8)
    padding = "疱" * ((1500 - whole["prompt_tokens"]) // 3)  # three bytes, three tokens each
    cut = finished(engine, {"messages": messages("s", padding), "quote": spec})
    assert cut["prompt_tokens"] + whole["tokens"] > 2048
    assert 1 <= [kind for kind, *_ in cut["pieces"]].count("sentence") < 8
    assert cut["stop_reason"] == "context"


def test_oldest_whole_turns_are_dropped_when_the_context_is_full(engine: Engine) -> None:
    turn = "疱疹性咽峡炎" * 40
    long = messages("s", turn, "甲。\n" * 50, turn, "乙。\n" * 50, turn, "丙。\n" * 50, "还有呢")
    event = finished(engine, {"messages": long, "quote": quote()})
    assert event["dropped_turns"] >= 1
    assert event["prompt_tokens"] <= 2048 - 512
    assert event["stop_reason"] == "eos"
    full = finished(engine, {"messages": messages("s", turn * 20), "quote": quote()})
    assert full["stop_reason"] == "context"
    assert "缩短问题" in full["error"]


def test_only_one_answer_at_a_time(engine: Engine) -> None:
    stream = engine.generate({"messages": messages("s", "水" * 200)})
    next(stream)
    with pytest.raises(EngineError, match="没有结束"):
        next(engine.generate({"messages": messages("s", "火")}))
    stream.close()
