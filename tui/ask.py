"""`ask`: one question, or a batch of them, through the same consultation the app uses."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tui.consultation import (
    DEMONSTRATION_NOTICE,
    Answer,
    Consultation,
    Delta,
    Finished,
    Mode,
    Passage,
    Reading,
    Task,
    sanitised,
)
from tui.engine import embedded_model
from tui.engine.process import Engine, ModelInfo
from tui.library import Library

_FAILED = 1
_MARKS = {"stopped": "（已停止）", "length": "（回答过长，已截断）", "context": "（上下文已满，回答不完整）"}


class InputError(Exception):
    """The input cannot be used; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Request:
    """What `ask` was asked to do."""

    question: str | None = None
    batch: str | None = None
    output: Path | None = None
    json: bool = False
    quiet: bool = False
    show_question: bool = False


def answer(request: Request, options: argparse.Namespace) -> int:
    """Carry out a request; returns the exit code. Raises InputError, EngineError or LibraryError."""
    # Input is read before the model is loaded: what is wrong with it is said at once.
    lines = list(_batch_lines(request.batch)) if request.batch else []
    question = None if request.batch else _question(request.question)
    with Engine.start(options.model or embedded_model(), context=options.context, threads=options.threads) as engine:
        library = Library.load()
        status = sys.stderr if not request.quiet else None
        if status:
            print("正在载入模型……", file=status, flush=True)
        info = engine.wait_ready()
        if info.demonstration:
            print(DEMONSTRATION_NOTICE, file=sys.stderr, flush=True)
        for note in info.notes if status else ():
            print(note, file=status)
        mode = Mode(options.mode) if options.mode else None
        if question is None:
            with _output(request.output) as stream:
                return _answer_batch(lines, engine, library, Task(options.task), mode, stream)
        consultation = Consultation(engine, library, task=Task(options.task), mode=mode)
        if request.json:
            result = _finish(consultation, question)
            print(json.dumps(to_json(result, question, info), ensure_ascii=False, indent=2))
        else:
            if request.show_question:
                print(f"问：{question}\n")
            result = _stream(consultation, question, status)
            _print_passages(result, info)
        if result.error:
            print(f"pediatricsgpt: {result.error}", file=sys.stderr)
        return _FAILED if result.error else 0


def to_json(result: Answer, question: str, info: ModelInfo) -> dict[str, Any]:
    """One answer as the object `--json` prints and `--batch` writes."""
    return {
        "question": question,
        "mode": result.mode.value,
        "task": result.task.value,
        "answer": result.text,
        "cited": list(result.cited),
        "passages": [
            {
                "number": p.number,
                "card_id": p.card_id,
                "title": p.title,
                "section": p.section,
                "score": p.score,
                "sources": [_source(p, index) for index in range(len(p.sources))],
            }
            for p in result.passages
        ],
        "cards": list(result.cards),
        "confidence": result.confidence,
        "refused": result.refused,
        "unsupported": list(result.unsupported),
        "stop_reason": result.stop_reason,
        "error": result.error,
        "tokens": result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "reused_tokens": result.reused_tokens,
        "dropped_turns": result.dropped_turns,
        "seconds": round(result.seconds, 4),
        "first_token_seconds": round(result.first_token_seconds, 4),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "model": info.name,
        "demonstration": info.demonstration,
        "notice": DEMONSTRATION_NOTICE if info.demonstration else None,
    }


def _finish(consultation: Consultation, question: str) -> Answer:
    """Ask and wait for the whole answer."""
    *_, last = consultation.ask(question)
    assert isinstance(last, Finished)
    return last.answer


def _stream(consultation: Consultation, question: str, status: IO[str] | None) -> Answer:
    """Ask and print the text while it comes."""
    result = None
    for event in consultation.ask(question):
        match event:
            case Reading(done, total) if status and status.isatty():
                print(f"\r正在阅读资料 {done}/{total}", end="\n" if done == total else "", file=status, flush=True)
            case Delta(text):
                print(text, end="", flush=True)
            case Finished(answer=found):
                result = found
    assert result is not None
    if not result.text.endswith("\n"):
        print()
    if mark := _MARKS.get(result.stop_reason):
        print(mark)
    return result


def _print_passages(result: Answer, info: ModelInfo) -> None:
    """The passages behind the answer with their sources, and how it was made."""
    shown = [p for p in result.passages if p.number in result.cited] or (
        list(result.passages) if result.mode is Mode.GROUNDED else []
    )
    if shown:
        print("\n资料")
    for passage in shown:
        print(f"[{passage.number}] {passage.title}·{passage.section}")
        print("    " + "".join(passage.sentences))
        for index in range(len(passage.sources)):
            print(f"    来源：{_source(passage, index)}")
    for sentence in result.unsupported:
        print(f"资料未支持：{sentence}")
    print(f"\n{result.mode.label} · {result.task.label} · {result.tokens} 词元，{result.tokens_per_second:.0f} 词元/秒")
    if info.demonstration:
        print(DEMONSTRATION_NOTICE)


def _source(passage: Passage, index: int) -> str:
    source = passage.sources[index]
    return f"{source.title}（{source.organisation}，{source.edition}）"


def _question(text: str | None) -> str:
    """The question from the command line or standard input; raises InputError."""
    if text is None or text == "-":
        if sys.stdin.isatty():
            print("请输入问题，以 Ctrl-D 结束：", file=sys.stderr)
        text = _decoded(sys.stdin.buffer.read(), "standard input")
    text = sanitised(text).strip()
    if not text:
        raise InputError('the question is empty; write it behind "ask" or send it through standard input.')
    return text


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            f"{where} is not UTF-8 (line {line}); convert it, for instance: iconv -f GB18030 -t UTF-8."
        ) from error


def _batch_lines(name: str) -> Iterator[dict[str, Any]]:
    """The checked lines of a batch; raises InputError with the line number."""
    where = "standard input" if name == "-" else name
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}); check the path.") from error
    for number, text in enumerate(_decoded(raw, where).split("\n"), 1):
        if text.strip():
            yield _checked(text, f"{where} line {number}")


def _checked(text: str, where: str) -> dict[str, Any]:
    known = {"question", "id", "task", "mode", "history"}
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); write one object per line.") from error
    if not isinstance(line, dict) or not isinstance(line.get("question"), str) or not line["question"].strip():
        raise InputError(f'{where} needs a "question" with text.')
    if unknown := sorted(set(line) - known):
        raise InputError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    history = line.get("history", [])
    if not isinstance(history, list) or not all(isinstance(q, str) and q.strip() for q in history):
        raise InputError(f'{where}: "history" is a list of earlier questions.')
    for key, values in (("task", Task), ("mode", Mode)):
        if key in line and line[key] not in list(values):
            raise InputError(f'{where}: "{key}" is one of {", ".join(values)}, not {line[key]!r}.')
    return line


def _answer_batch(
    lines: list[dict[str, Any]], engine: Engine, library: Library, task: Task, mode: Mode | None, stream: IO[str]
) -> int:
    """Answer each line in order, each in a new consultation that first hears its history."""
    failed = False
    for line in lines:
        consultation = Consultation(
            engine,
            library,
            task=Task(line.get("task", task)),
            mode=Mode(line["mode"]) if "mode" in line else mode,
        )
        for earlier in line.get("history", []):
            _finish(consultation, earlier)
        result = _finish(consultation, line["question"])
        failed = failed or result.stop_reason == "error"
        written = to_json(result, line["question"], engine.wait_ready())
        stream.write(json.dumps({"id": line.get("id"), **written}, ensure_ascii=False) + "\n")
        stream.flush()
    return _FAILED if failed else 0


@contextmanager
def _output(path: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a file that gets its name only when it is complete."""
    if path is None:
        yield sys.stdout
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            yield stream
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); check folder and disk space.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
