"""`pediatricsgpt preview`: what a stage is fed, with the loss mask in colour."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from trainer.commands.shared import add_recipe, command_parser, default_corpus, fail, work_offline
from trainer.corpus.record import CorpusError
from trainer.recipe import STAGES, RecipeError, load_recipe

if TYPE_CHECKING:
    from trainer.preview import Document, Preview, Row, Span

_CONTEXT, _CUT = "dim", "bold red"
_SCORED = {"rejected": "bold magenta"}  # every other role: green
_OPEN, _CLOSE = "【", "】"
_JOINER = "\u200d"  # joins emoji


def main(argv: list[str]) -> int:
    """Prints the rows that a few records become."""
    parser = command_parser(
        "preview",
        "Build a stage's trainer on a few records and show its batches as text: what the loss counts in colour, the\n"
        "context dim, special tokens, the borders inside packs, and what max_length cuts off.",
        "examples:\n"
        "  pediatricsgpt preview demo\n"
        "  pediatricsgpt preview demo --stage dfpo -n 1\n"
        "  pediatricsgpt preview my.yaml stages.sft.packing=true -n 20 --seed 1 --plain | less",
    )
    add_recipe(parser)
    parser.add_argument("--stage", choices=STAGES, default="sft", help="which stage (default: sft)")
    parser.add_argument("-n", type=int, default=3, metavar="N", help="how many records (default: 3)")
    parser.add_argument("--seed", type=int, help="take random records; without it the first ones")
    parser.add_argument("--corpus", type=Path, help="corpus folder (default: PedCorpus/NAME)")
    parser.add_argument("--plain", action="store_true", help=f"no colours: {_OPEN}what the loss counts{_CLOSE}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.n < 1:
        parser.error("-n must be above 0")
    work_offline()
    status_console = Console(stderr=True)
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        with status_console.status("loading the training libraries") as status:
            from trainer.planning.prepare import prepared_corpus, quieten_libraries
            from trainer.preview import preview

            quieten_libraries()
            status.update("building the corpus")
            with prepared_corpus(recipe, arguments.corpus or default_corpus(recipe)) as corpus:
                status.update(f"building the trainer of {arguments.stage}")
                shown = preview(recipe, corpus, arguments.stage, arguments.n, arguments.seed)
    except (RecipeError, CorpusError, OSError) as error:
        return fail(error)
    if arguments.json:
        print(as_json(shown))
    else:
        print_preview(shown, Console(no_color=arguments.plain, highlight=False), arguments.plain)
    return 0


def as_json(shown: Preview) -> str:
    """The preview as JSON with the exact texts; control characters are escaped, also those JSON would let pass."""
    data = asdict(shown)
    for row, plain in zip(shown.rows, data["rows"], strict=True):
        for document, fields in zip(row.documents, plain["documents"], strict=True):
            fields |= {"tokens": document.tokens, "scored": document.scored}
    text = json.dumps(data, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)


def print_preview(shown: Preview, console: Console, plain: bool) -> None:
    """Rows for the terminal."""
    console.print(_legend(shown, plain))
    for number, row in enumerate(shown.rows, 1):
        console.print()
        console.rule(_title(number, row), align="left", style="dim", characters="─")
        console.print(_pair(row, plain) if shown.stage == "dfpo" else _row(row, plain, shown.max_length))
    if shown.left_out:
        console.print(
            f"\n{shown.left_out} of {shown.records} records are left out: max_length ({shown.max_length}) ends before "
            "their answer begins.",
            style=_CUT,
            soft_wrap=True,
        )


def _legend(shown: Preview, plain: bool) -> Text:
    legend = Text(f"{shown.stage}: {shown.records} records, max_length {shown.max_length}, ")
    legend.append("packed. " if shown.packed else "not packed. ")
    if plain:
        legend.append(f"{_OPEN}counted by the loss{_CLOSE}")
    else:
        sides = {"chosen": _SCORED.get("chosen", "bold green"), "rejected": _SCORED["rejected"]}
        for name, style in sides.items() if shown.stage == "dfpo" else [("counted by the loss", "bold green")]:
            legend.append(name, style).append("  ")
        legend.append("context", _CONTEXT).append("  ").append("special token", "underline").append("  ↵ line end")
    return legend


def _title(number: int, row: Row) -> Text:
    tokens, scored = sum(d.tokens for d in row.documents), sum(d.scored for d in row.documents)
    title = f"row {number} (batch {row.batch}): {tokens} tokens, {scored} counted ({scored / max(1, tokens):.0%})"
    return Text(title + (f", {row.padding} padding" if row.padding else ""))


def _row(row: Row, plain: bool, max_length: int) -> Text:
    text = Text()
    for place, document in enumerate(row.documents, 1):
        if place > 1:
            text.append(f"\n┄┄┄ document {place} of the pack: positions start at 0, no attention across ┄┄┄\n", "cyan")
        text.append(_written(document.spans, document.role, plain)).append(_end(document, max_length))
    return text


def _pair(row: Row, plain: bool) -> Text:
    """The prompt once, then both answers."""
    text = Text()
    prompt = [span for span in row.documents[0].spans if not span.scored]
    text.append("prompt\n", "cyan").append(_written(prompt, "prompt", plain))
    for document in row.documents:
        answer = [span for span in document.spans if span.scored]
        text.append(f"\n{document.role} ({document.scored} tokens)\n", "cyan")
        text.append(_written(answer, document.role, plain)).append(_end(document, None))
    return text


def _written(spans: list[Span], role: str, plain: bool) -> Text:
    text, inside = Text(), False
    for span in spans:
        if plain and span.scored != inside:
            text.append(_OPEN if span.scored else _CLOSE)
            inside = span.scored
        style = _SCORED.get(role, "bold green") if span.scored else _CONTEXT
        text.append(visible(span.text), "" if plain else f"{style} underline" if span.special else style)
    return text.append(_CLOSE) if inside else text


def _end(document: Document, max_length: int | None) -> Text:
    if document.continues:
        return Text(" … goes on in another row", "cyan")
    if document.dropped:
        limit = f" ({max_length})" if max_length else ""
        return Text(f" ✂ {document.dropped} tokens behind max_length{limit} are dropped", _CUT)
    return Text()


def visible(text: str) -> str:
    """Text that a terminal can only print: control characters become pictures, line ends a mark and a line end."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character < " ":
        return chr(0x2400 + ord(character))  # the block of control pictures has the same order
    if character == "\x7f":
        return "␡"
    if character == _JOINER:
        return character
    # C1 controls, and the marks that turn the direction of writing or break lines.
    return "�" if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs") else character
