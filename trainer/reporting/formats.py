"""How figures are written in report.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table whose first `text` columns are words; the others are aligned right."""
    rule = ["---" if column < text else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def span(values: Sequence[float]) -> str:
    """The first and the last of some figures."""
    return f"{number(values[0])} → {number(values[-1])}" if values else ""


def number(value: float | None) -> str:
    """Whole numbers in full, others with four digits that count."""
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def size(count: float | None) -> str:
    """Bytes as MB or GB."""
    if not count:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
