"""Plain text to styled content, with nothing in it interpreted as markup."""

from __future__ import annotations

import re
from collections.abc import Iterable

from textual.content import Content, Span

from tui.consultation import Source, sanitised
from tui.library.support import sentences

_CITATION = re.compile(r"\[(\d{1,2})\]")
_HEADING = re.compile(r"^.{0,80}\[(\d{1,2})\]：$", re.MULTILINE)  # 根据手足口病·家庭护理[1]：
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
    """Style an answer: citations of known passages stand out, lines that only cite one are quiet headings.

    Every sentence that equals one of ``unsupported`` is marked in words; those that do not occur are ignored.
    """
    numbers = set(known)
    body, spans = _marked(text.strip("\n"), {sentence.strip() for sentence in unsupported})
    for match in _HEADING.finditer(body):
        if int(match.group(1)) in numbers:
            spans.append(Span(*match.span(), "$muted"))
    for match in _CITATION.finditer(body):
        if int(match.group(1)) in numbers:
            spans.append(Span(*match.span(), "bold $primary"))
    return Content(body, spans=spans)


def _marked(text: str, unsupported: set[str]) -> tuple[str, list[Span]]:
    """``text`` with a mark after every unsupported sentence, and the styles of both."""
    body, spans, position = "", list[Span](), 0
    for sentence in sentences(text):  # in order, so the next one is the first one found from here on
        start = text.index(sentence, position)
        end = start + len(sentence)
        body += text[position:end]
        if sentence in unsupported:
            spans.append(Span(len(body) - len(sentence), len(body), "$warning"))
            spans.append(Span(len(body), len(body) + len(UNSUPPORTED), "bold $warning"))
            body += UNSUPPORTED
        position = end
    return body + text[position:], spans


def source_line(source: Source) -> str:
    """Title, edition and organisation of a source in one line."""
    return f"《{source.title}》{source.edition}，{source.organisation}"
