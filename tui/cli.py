"""The commands of the consultation room: `consult` (the app) and `ask` (one answer, or a batch, as text or JSON)."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tui.ask import Request

TASKS = ("knowledge", "diagnosis", "treatment")
MODES = ("quote", "grounded", "free")
SAMPLE_QUESTION = "孩子发烧38.5℃，精神还好，在家怎么护理？"
_USAGE, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141

_CONSULT_HELP = """\
Open the consultation. Without a terminal (a pipe, CI) one sample question is answered as plain text.

examples:
  pediatricsgpt                                   the embedded demonstration model
  pediatricsgpt consult --model Qwen3-1.7B-Q4_K_M.gguf --mode grounded
"""
_ASK_HELP = """\
Answer a question on standard output; notices and errors go to standard error.

modes: quote     only sentences of the reviewed passages (default for a demonstration model)
       grounded  written freely over the passages, unsupported sentences are marked (default otherwise)
       free      the bare model

examples:
  pediatricsgpt ask "手足口病什么时候要送医院？"
  pediatricsgpt ask --task treatment "孩子拉肚子吃什么药" --json
  echo "宝宝咳嗽像小狗叫" | pediatricsgpt ask --task diagnosis
  pediatricsgpt ask --batch questions.jsonl --output answers.jsonl

A line of a batch: {"question": "...", "id": 1, "task": "diagnosis", "mode": "quote", "history": ["earlier question"]};
only "question" is needed. One JSON answer per line comes out, in the same order.
An interrupted --output FILE leaves its answers in FILE.part. Exit code 1: an answer broke off or did not fit.
"""


def consult(argv: list[str]) -> int:
    """Open the app, or answer a sample question where there is no terminal; returns the exit code."""
    parser = _parser("consult", _CONSULT_HELP)
    parser.add_argument(
        "--ascii", action="store_true", help="no box lines, for terminals that draw them two cells wide"
    )
    options = parser.parse_args(argv)
    from tui.ask import Request

    # Textual reads standard input and draws on standard error.
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        return _run(Request(question=SAMPLE_QUESTION, show_question=True), options)
    return _guarded(lambda: _open_app(options))


def ask(argv: list[str]) -> int:
    """Answer one question or a batch; returns the exit code."""
    parser = _parser("ask", _ASK_HELP)
    parser.add_argument("question", nargs="?", help='the question; none or "-": read from standard input')
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quiet", action="store_true", help="no status lines (the demonstration notice stays)")
    parser.add_argument("--batch", metavar="FILE", help='questions as JSON lines, "-" for standard input')
    parser.add_argument("--output", metavar="FILE", type=Path, help="with --batch: write the answers here")
    options = parser.parse_args(argv)
    if options.batch and options.question:
        parser.error("give either a question or --batch, not both")
    if options.output and not options.batch:
        parser.error("--output needs --batch")
    from tui.ask import Request

    return _run(
        Request(
            question=options.question,
            batch=options.batch,
            output=options.output,
            json=options.json,
            quiet=options.quiet,
        ),
        options,
    )


COMMANDS: dict[str, Callable[[list[str]], int]] = {"consult": consult, "ask": ask}


def _parser(name: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"pediatricsgpt {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FILE", type=Path, help="a GGUF model (default: the embedded one)")
    parser.add_argument("--task", choices=TASKS, default="knowledge", help="consultation task (knowledge)")
    parser.add_argument("--mode", choices=MODES, help="how the answer is made (default: by the model)")
    parser.add_argument("--context", type=_positive, default=2048, metavar="N", help="context in tokens (2048)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="threads (default: physical cores)")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _open_app(options: argparse.Namespace) -> int:
    from tui.app import run
    from tui.consultation import Mode, Task
    from tui.engine import embedded_model

    mode = Mode(options.mode) if options.mode else None
    return run(
        options.model or embedded_model(),
        Task(options.task),
        mode,
        context=options.context,
        threads=options.threads,
        ascii_only=options.ascii,
    )


def _run(request: Request, options: argparse.Namespace) -> int:
    from tui.ask import answer

    return _guarded(lambda: answer(request, options))


def _guarded(action: Callable[[], int]) -> int:
    """Turn expected failures into one sentence on standard error and an exit code."""
    from tui.batch import InputError
    from tui.engine import EngineError
    from tui.engine.contract import sanitised
    from tui.library.cards import LibraryError

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A pipe is UTF-8 whatever the locale; a terminal shows ? for what it cannot show.
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    try:
        code = action()
        sys.stdout.flush()
        return code
    except (EngineError, LibraryError, InputError) as error:
        print(f"pediatricsgpt: {sanitised(str(error))}", file=sys.stderr)
        return _USAGE
    except BrokenPipeError:
        _abandon_output()  # whoever read it has seen enough
        return _BROKEN_PIPE
    except OSError as error:
        _abandon_output()
        what = sanitised(str(error.filename or "the output"))
        print(f"pediatricsgpt: {what} cannot be used ({error.strerror}); check disk and permissions.", file=sys.stderr)
        return _USAGE
    except KeyboardInterrupt:
        print("\n已停止。", file=sys.stderr)
        return _INTERRUPTED


def _abandon_output() -> None:
    """Nothing more may be flushed into standard output, also not when Python ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
