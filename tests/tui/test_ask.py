"""`ask` and `consult` from outside: pipes, JSON, batches, bad input, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTICE = "演示模型，仅供演示，不可用于诊疗"
RUN = "import sys; from tui.cli import COMMANDS; sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))"


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-c", RUN, *map(str, arguments)]


def run(*arguments: Any, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, cwd=ROOT, timeout=60, **options)


def test_answer_goes_to_stdout_with_its_sources_and_status_to_stderr(tiny_gguf: Path) -> None:
    done = run("ask", "手足口病什么时候要送医院？", "--model", tiny_gguf, "--threads", 1)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0
    assert NOTICE in out
    assert NOTICE in err
    assert "载入" in err
    assert "载入" not in out
    assert "来源：" in out or "资料中没有" in out
    quiet = run("ask", "手足口病", "--model", tiny_gguf, "--threads", 1, "--quiet")
    assert quiet.stderr.decode().strip() == NOTICE


def test_question_from_standard_input(tiny_gguf: Path) -> None:
    for arguments in ((), ("-",)):
        done = run("ask", *arguments, "--model", tiny_gguf, "--threads", 1, "--json", stdin="水痘会传染吗\n".encode())
        assert json.loads(done.stdout)["question"] == "水痘会传染吗"


def test_json_is_one_object(tiny_gguf: Path) -> None:
    done = run("ask", "拉肚子吃什么药", "--task", "treatment", "--model", tiny_gguf, "--threads", 1, "--json")
    answer = json.loads(done.stdout)
    assert answer["cards"][0] == "acute-diarrhoea"
    assert (answer["task"], answer["mode"], answer["stop_reason"]) == ("treatment", "quote", "eos")
    assert answer["demonstration"] is True
    assert answer["notice"] == NOTICE
    assert answer["tokens"] > 0
    assert {"number", "card_id", "title", "section"} <= set(answer["passages"][0])
    assert len(answer["passages"][0]["red_flags"]) > 1


def test_batch_answers_in_order_each_for_itself(tiny_gguf: Path, tmp_path: Path) -> None:
    lines = [
        {"question": "水痘会传染吗", "id": "a"},
        {"question": "没有别的了", "id": 2, "task": "diagnosis", "history": ["孩子拉肚子，大便像水"]},
        {"question": "水痘会传染吗", "mode": "free"},
    ]
    source, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    done = run("ask", "--batch", source, "--output", output, "--model", tiny_gguf, "--threads", 1)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == b""
    answers = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [answer["id"] for answer in answers] == ["a", 2, None]
    assert [answer["question"] for answer in answers] == [line["question"] for line in lines]
    assert any("diarrhoea" in card or "dehydration" in card for card in answers[1]["cards"])
    assert answers[2]["mode"] == "free"
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b'{"question": "a"}\n{"question": \n', "line 2 is not JSON"),
        (b'{"question": "a"}\n["a"]', "line 2"),
        (b'{"question": ""}', "line 1"),
        (b'{"question": "a", "tsak": "x"}', "'tsak'"),
        (b'{"question": "a", "task": "x"}', "knowledge"),
        (b'{"question": "a", "history": "x"}', "history"),
        (b'{"question": "a", "history": ["\\u200b"]}', "history"),
        (b'{"question": "\\u200b"}', "line 1"),
        (b'{"question": "a\\ud800"}', "line 1"),
        (b'{"question": "a", "id": [1]}', '"id"'),
        (b"[" * 100_000, "line 1"),
        (b'{"question": "a", "\\u001b[31m": 1}', "unknown key"),
        (b'{"question": "a"}\n\n{"question": "' + "发烧".encode("gb18030") + b'"}', "line 3"),
    ],
)
def test_bad_batch_lines_are_named_before_anything_runs(tiny_gguf: Path, text: bytes, cause: str) -> None:
    done = run("ask", "--batch", "-", "--model", tiny_gguf, stdin=text)
    assert done.returncode == 2
    assert cause in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("arguments", "stdin", "cause"),
    [
        (("ask",), b"  \n", "empty"),
        (("ask",), "发烧".encode("gb18030"), "not UTF-8"),
        (("ask", "x", "--batch", "y"), b"", "not both"),
        (("ask", "x", "--output", "y"), b"", "--batch"),
        (("ask", "--batch", "missing.jsonl"), b"", "cannot be read"),
        (("ask", "x", "--task", "y"), b"", "invalid choice"),
        (("ask", "x", "--context", "abc"), b"", "'abc' is not a whole number"),
        (("ask", "x", "--context", "0"), b"", "'0' is not a whole number"),
        (("ask", os.fsdecode("发烧".encode("gb18030"))), b"", "not UTF-8"),
        (("ask", "x", "--model", "\x1b[31mred.gguf"), b"", " [31mred.gguf"),
        (("ask", "x", "--model", "missing.gguf"), b"", "missing.gguf"),
        (("ask", "x", "--model", __file__), b"", "GGUF"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], stdin: bytes, cause: str) -> None:
    done = run(*arguments, stdin=stdin)
    assert done.returncode == 2
    assert cause in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()


def test_consult_without_a_terminal_answers_a_sample_question(tiny_gguf: Path) -> None:
    done = run("consult", "--model", tiny_gguf, "--threads", 1)
    assert done.returncode == 0
    assert done.stdout.decode().startswith("问：")
    assert NOTICE in done.stdout.decode()


def test_closed_pipe_is_quiet(tiny_gguf: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" | true', "bash", *command("ask", "发烧怎么办", "--model", tiny_gguf, "--mode", "free")],
        capture_output=True,
        cwd=ROOT,
        timeout=60,
    )
    assert "Traceback" not in done.stderr.decode()
    assert "Broken" not in done.stderr.decode()


def test_interrupt_stops_with_130(big_gguf: Path) -> None:
    process = writing(big_gguf)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - begin < 5
    assert process.returncode == 130
    assert "Traceback" not in err.decode()
    assert out.decode("utf-8", "replace").endswith("\n（已停止）\n")


def test_answer_cut_by_the_death_of_the_model_is_marked(big_gguf: Path) -> None:
    process = writing(big_gguf)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    os.kill(int("".join(path.read_text() for path in children).split()[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "（出错中断，回答不完整）" in out.decode("utf-8", "replace")
    assert "重新提问" in err.decode()


def writing(model: Path) -> subprocess.Popen[bytes]:
    """An `ask` that has written the first character of a long answer."""
    process = subprocess.Popen(
        command("ask", "发烧怎么办", "--model", model, "--mode", "free", "--threads", 1),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_full_disk_is_one_sentence(tiny_gguf: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command("ask", "发烧", "--model", tiny_gguf, "--quiet"), stdout=full, stderr=subprocess.PIPE, cwd=ROOT
        )
    assert done.returncode == 2
    assert "the output cannot be used (No space left on device)" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert "Exception" not in done.stderr.decode()


def test_danger_signs_stand_below_the_answer(tiny_gguf: Path) -> None:
    arguments = ("ask", "孩子拉肚子怎么办", "--model", tiny_gguf, "--threads", 1, "--quiet", "--mode")
    assert "出现任何一项立即转诊\n    · " in run(*arguments, "grounded").stdout.decode()
    assert "立即转诊\n    · " not in run(*arguments, "free").stdout.decode()  # not from the cards


def test_interrupted_batch_keeps_what_was_answered(big_gguf: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text('{"question": "水痘", "mode": "quote"}\n' + '{"question": "水痘", "mode": "free"}\n' * 50)
    part = tmp_path / "a.jsonl.part"
    arguments = ("ask", "--batch", source, "--output", output, "--model", big_gguf, "--threads", 1)
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert not output.exists()
    assert json.loads(part.read_text(encoding="utf-8").splitlines()[0])["question"] == "水痘"
    assert str(part) in err.decode()
    again = run(*arguments)
    assert again.returncode == 2  # and what was kept is not written over
    assert "interrupted run" in again.stderr.decode()


def test_answer_without_room_is_a_failure_in_a_batch_too(tiny_gguf: Path) -> None:
    question = "疱疹性咽峡炎" * 500
    single = run("ask", question, "--model", tiny_gguf, "--threads", 1, "--quiet")
    batch = run("ask", "--batch", "-", "--model", tiny_gguf, "--threads", 1,
                stdin=json.dumps({"question": question}).encode())  # fmt: skip
    assert (single.returncode, batch.returncode) == (1, 1)
    assert json.loads(batch.stdout)["stop_reason"] == "context"


def test_unwritable_output_leaves_nothing(tiny_gguf: Path, tmp_path: Path) -> None:
    done = run("ask", "--batch", "-", "--output", tmp_path / "no" / "a.jsonl", "--model", tiny_gguf,
               stdin='{"question": "发烧"}'.encode())  # fmt: skip
    assert done.returncode == 2
    assert "cannot be written" in done.stderr.decode()


def test_importing_the_commands_imports_nothing_heavy() -> None:
    heavy = "('numpy', 'textual', 'llama_cpp', 'yaml', 'jinja2')"
    script = f"import sys, tui.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, env={**os.environ})
    assert done.stdout.decode().strip() == "[]"
