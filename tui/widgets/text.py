"""Plain text to styled content, with nothing in it interpreted as markup."""

from __future__ import annotations

import re
from collections.abc import Iterable

from textual.content import Content, Span

from tui.consultation import Source, sanitised

_CITATION = re.compile(r"\[(\d{1,2})\]")
UNSUPPORTED = "（资料未支持）"


def printable(text: str) -> str:
    """Return ``text`` without control, escape and direction-changing characters, with line feeds only."""
    return sanitised("\n".join(text.splitlines()).expandtabs(4))


def cited_numbers(text: str, known: Iterable[int]) -> tuple[int, ...]:
    """Return the passage numbers cited in ``text``, in order of appearance, each once."""
    numbers = set(known)
    found = (int(match.group(1)) for match in _CITATION.finditer(text))
    return tuple(dict.fromkeys(number for number in found if number in numbers))


def answer_content(text: str, known: Iterable[int] = (), unsupported: Iterable[str] = ()) -> Content:
    """Style an answer: citations of known passages stand out, unsupported sentences are marked in words.

    ``unsupported`` sentences that do not occur in ``text`` are ignored.
    """
    body = text.strip("\n")
    spans: list[Span] = []
    for sentence in dict.fromkeys(part.strip() for part in unsupported):
        start = body.find(sentence) if sentence else -1
        if start < 0:
            continue
        end = start + len(sentence)
        body = body[:end] + UNSUPPORTED + body[end:]
        shift = len(UNSUPPORTED)
        spans = [Span(a + shift, b + shift, style) if a >= end else Span(a, b, style) for a, b, style in spans]
        spans += [Span(start, end, "$warning"), Span(end, end + shift, "bold $warning")]
    numbers = set(known)
    spans += [
        Span(*match.span(), "bold $primary") for match in _CITATION.finditer(body) if int(match.group(1)) in numbers
    ]
    return Content(body, spans=spans)


def source_line(source: Source) -> str:
    """Title, edition and organisation of a source in one line."""
    return f"《{source.title}》{source.edition}，{source.organisation}"


def _moved(span: Span, by: int) -> Span:
    return Span(span.start + by, span.end + by, span.style)
