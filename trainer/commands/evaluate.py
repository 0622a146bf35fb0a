"""`pediatricsgpt evaluate`: measures a model on held-out questions, through the app's own door."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.commands.shared import command_parser, fail
from trainer.corpus.record import CorpusError


def main(argv: list[str]) -> int:
    """Measures the embedded model on held-out questions."""
    parser = command_parser(
        "evaluate",
        "Ask the held-out questions through `pediatricsgpt ask --batch` and print one table per mode.\n"
        "The limits hold for quote mode; exit code 1 means that one of them is missed.",
        "examples:\n  pediatricsgpt evaluate embedded\n  pediatricsgpt evaluate embedded --mode quote --json\n"
        "  pediatricsgpt evaluate embedded --model dist/demo/demo-Q8_0.gguf",
    )
    parser.add_argument("what", choices=["embedded"], help="what to measure")
    parser.add_argument("--model", type=Path, help="GGUF file (default: the embedded model)")
    parser.add_argument("--mode", action="append", choices=["quote", "grounded", "free"], help="default: all three")
    parser.add_argument("--set", default="test", choices=["test", "development"], help="which questions")
    parser.add_argument("--answers", type=Path, help="also write every answer with its verdict to this JSON Lines file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from trainer.evaluate import embedded

    console = Console(stderr=True)
    tables: dict[str, dict[str, float]] = {}
    rows: list[dict[str, object]] = []
    try:
        if arguments.answers:
            arguments.answers.touch()  # a bad path is said before the questions are asked, not after
        questions = embedded.load_questions(arguments.set)
        library = embedded.library_sentences()
        for mode in arguments.mode or embedded.MODES:
            with console.status(f"{mode}: {len(questions)} questions"):
                answers = embedded.ask(questions, mode, arguments.model)
            judged = [embedded.judge(q, a, library) for q, a in zip(questions, answers, strict=True)]
            tables[mode] = embedded.table(judged)
            rows += [{**j.question.model_dump(), **j.answer, "on_topic": j.on_topic} for j in judged]
    except (embedded.EvaluationError, CorpusError, OSError) as error:
        return fail(error)
    if arguments.answers:
        arguments.answers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    held = embedded.gates(tables["quote"]) if "quote" in tables else {}
    if arguments.json:
        print(json.dumps({"set": arguments.set, **tables.get("quote", {}), "modes": tables, "gates": held}))
    else:
        _print_tables(tables, held, embedded.GATES)
    return 0 if all(held.values()) else 1


def _print_tables(tables: dict[str, dict[str, float]], held: dict[str, bool], limits: dict[str, float]) -> None:
    view = Table("figure", *tables, "limit (quote)", "")
    for name in next(iter(tables.values())):
        mark = {True: "held", False: "MISSED"}.get(held.get(name), "")  # type: ignore[arg-type]
        view.add_row(name, *(f"{figures[name]:g}" for figures in tables.values()), str(limits.get(name, "")), mark)
    Console().print(view)
