"""`ask`: one question, or a batch of them, through the same consultation the app uses."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tui.batch import InputError, batch_lines, decoded, output
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
_MARKS = {
    "stopped": "（已停止）",
    "length": "（回答过长，已截断）",
    "context": "（上下文已满，回答不完整）",
    "error": "（出错中断，回答不完整）",
}


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
    lines = list(batch_lines(request.batch)) if request.batch else []
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
            print(note, file=status, flush=True)
        mode = Mode(options.mode) if options.mode else None
        if question is None:
            with output(request.output) as stream:
                return _answer_batch(lines, engine, library, info, Task(options.task), mode, stream)
        consultation = Consultation(engine, library, task=Task(options.task), mode=mode)
        if request.json:
            result = _finish(consultation, question)
            print(_json(to_json(result, question, info), indent=2))
        else:
            if request.show_question:
                print(f"问：{question}\n")
            result = _stream(consultation, question, status)
            _print_passages(result, info)
        if result.error:
            print(f"pediatricsgpt: {result.error}", file=sys.stderr)
        return _FAILED if _failed(result) else 0


def _failed(result: Answer) -> bool:
    """Whether there is no whole answer: something broke, or the context was full."""
    return result.error is not None or result.stop_reason in ("error", "context")


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
                "red_flags": list(p.red_flags),
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


def _json(value: dict[str, Any], indent: int | None = None) -> str:
    # JSON leaves some control characters of a question or a name as they are
    return sanitised(json.dumps(value, ensure_ascii=False, indent=indent))


def _finish(consultation: Consultation, question: str) -> Answer:
    """Ask and wait for the whole answer."""
    *_, last = consultation.ask(question)
    assert isinstance(last, Finished)
    return last.answer


def _stream(consultation: Consultation, question: str, status: IO[str] | None) -> Answer:
    """Ask and print the text while it comes; what is not whole is marked as such, also after a Ctrl-C."""
    result, shown = None, ""
    try:
        for event in consultation.ask(question):
            match event:
                case Reading(done, total) if status and status.isatty():
                    end = "\n" if done == total else ""
                    print(f"\r正在阅读资料 {done}/{total}", end=end, file=status, flush=True)
                case Delta(text):
                    shown = text
                    print(text, end="", flush=True)
                case Finished(answer=found):
                    result = found
        assert result is not None
        _print_mark(shown, result.stop_reason)
    except KeyboardInterrupt:
        consultation.stop()
        _print_mark(shown, "stopped")
        raise
    return result


def _print_mark(shown: str, stop_reason: str) -> None:
    """End the line, and say why the answer is not whole if it is not."""
    if not shown.endswith("\n"):
        print()
    if mark := _MARKS.get(stop_reason):
        print(mark, flush=True)


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
    for title, flags in _red_flags(result).items():
        print(f"\n危险信号（{title}）：出现任何一项立即转诊")
        for flag in flags:
            print(f"    · {flag}")
    print(f"\n{result.mode.label} · {result.task.label} · {result.tokens} 词元，{result.tokens_per_second:.0f} 词元/秒")
    if info.demonstration:
        print(DEMONSTRATION_NOTICE)


def _red_flags(result: Answer) -> dict[str, tuple[str, ...]]:
    """Title and danger signs of the cards the answer cites; where it cites none, of the first one found.

    None for a refusal, and none in free mode, where the answer does not come from the cards.
    """
    cited = [p for p in result.passages if p.number in result.cited]
    if not cited and not result.refused and result.mode is not Mode.FREE:
        cited = list(result.passages[:1])
    return {p.title: p.red_flags for p in cited if p.red_flags}


def _source(passage: Passage, index: int) -> str:
    source = passage.sources[index]
    return f"{source.title}（{source.organisation}，{source.edition}）"


def _question(text: str | None) -> str:
    """The question from the command line or standard input; raises InputError."""
    if text is None or text == "-":
        if sys.stdin.isatty():
            print("请输入问题，以 Ctrl-D 结束：", file=sys.stderr)
        text = decoded(sys.stdin.buffer.read(), "standard input")
    elif not _is_unicode(text):  # bytes of another encoding come as surrogates
        raise InputError("the question is not UTF-8; use a UTF-8 terminal, or send it through standard input as UTF-8.")
    text = sanitised(text).strip()
    if not text:
        raise InputError('the question is empty; write it behind "ask" or send it through standard input.')
    return text


def _is_unicode(text: str) -> bool:
    """False for text with surrogates, which no encoding can write."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _answer_batch(
    lines: list[dict[str, Any]],
    engine: Engine,
    library: Library,
    info: ModelInfo,
    task: Task,
    mode: Mode | None,
    stream: IO[str],
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
            failed = _failed(_finish(consultation, earlier)) or failed
        result = _finish(consultation, line["question"])
        failed = _failed(result) or failed
        written = to_json(result, line["question"], info)
        stream.write(_json({"id": line.get("id"), **written}) + "\n")
        stream.flush()
    return _FAILED if failed else 0
