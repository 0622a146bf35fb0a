"""Beside the answer: the danger signs of the cards it stands on and the passages with their sources."""

from __future__ import annotations

from collections.abc import Iterable

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from tui.consultation import Passage
from tui.widgets.text import printable, source_line

DANGER = "危险信号：出现任何一项立即转诊"
EMPTY = "提问后，这里列出从离线资料库找到的条目、原文与出处。"
NOTHING = "资料库里没有找到相关条目。"


class RedFlags(VerticalScroll, can_focus=True):
    """The danger signs of one or more cards; stays on the screen while its answer is shown, scrolls when long."""

    def __init__(self) -> None:
        super().__init__()
        self.display = False
        self._cards: dict[str, tuple[str, ...]] = {}
        self._signs = Static("", markup=False)

    def compose(self) -> ComposeResult:
        """One text."""
        yield self._signs

    @property
    def text(self) -> str:
        """The danger signs as they are shown; empty when the box is hidden."""
        return self._content().plain if self.display else ""

    def show(self, passages: Iterable[Passage]) -> None:
        """Show the signs of the cards of ``passages``; hide the box when there are none."""
        self._cards = {passage.title: passage.red_flags for passage in passages if passage.red_flags}
        self.display = bool(self._cards)
        self._signs.update(self._content())
        self.scroll_home(animate=False)

    def on_resize(self) -> None:
        """A list where there is room, running text where there is not."""
        self._signs.update(self._content())

    def _content(self) -> Content:
        wide = self.screen.has_class("-wide")
        parts: list[Content | tuple[str, str] | str] = [("! " + DANGER, "bold $danger")]
        for title, flags in self._cards.items():
            parts.append(("\n" + printable(title) + ("" if wide else "："), "bold"))
            if wide:
                parts += [f"\n· {printable(flag)}" for flag in flags]
            else:
                parts.append("；".join(printable(flag) for flag in flags))
        return Content.assemble(*parts)


class PassageView(Static):
    """One passage: number, title, section, text and sources."""

    def __init__(self, passage: Passage, *, cited: bool) -> None:
        super().__init__(_passage_content(passage, cited), markup=False)
        self.set_class(cited, "-cited")


class EvidencePanel(Vertical):
    """Danger signs on top, then one line that counts, then the passages; F3 opens and closes the passages."""

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, classes="-empty")
        self._shown: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        """Parts in the order of urgency."""
        yield RedFlags()
        with Horizontal(id="evidence-bar"):
            yield Static("资料", id="evidence-head", markup=False)
            yield Static("F3 展开/收起", id="evidence-key", markup=False)
        with VerticalScroll(id="evidence-list", can_focus=True):
            yield Static(EMPTY, classes="evidence-note", markup=False)

    def clear(self) -> None:
        """Nothing asked yet."""
        self.show((), (), (), searched=False)

    def show(
        self, passages: tuple[Passage, ...], cited: tuple[int, ...], alarming: tuple[int, ...], *, searched: bool
    ) -> None:
        """Show what was found for an answer, cheap when nothing changed.

        ``cited`` and ``alarming`` are numbers of passages: those the answer cites, those whose danger signs are shown.
        ``searched`` tells "nothing found" from "not yet".
        """
        searched = searched or bool(passages)
        if self._shown == (passages, cited, alarming, searched):
            return
        self._shown = (passages, cited, alarming, searched)
        self.set_class(not searched, "-empty")
        self.query_one(RedFlags).show(passage for passage in passages if passage.number in alarming)
        self.query_one("#evidence-head", Static).update(_headline(passages, cited))
        listing = self.query_one("#evidence-list", VerticalScroll)
        listing.remove_children()
        if passages:
            # Cited passages first: they are what the answer stands on.
            ordered = sorted(passages, key=lambda passage: (passage.number not in cited, passage.number))
            listing.mount(*(PassageView(passage, cited=passage.number in cited) for passage in ordered))
        else:
            listing.mount(Static(NOTHING if searched else EMPTY, classes="evidence-note", markup=False))
        listing.scroll_home(animate=False)


def _headline(passages: tuple[Passage, ...], cited: tuple[int, ...]) -> Content:
    parts = ["资料"]
    if passages:
        parts.append(f"{len(passages)} 条")
    if cited:
        parts.append("引用 " + "".join(f"[{number}]" for number in cited))
    return Content(" · ".join(parts))


def _passage_content(passage: Passage, cited: bool) -> Content:
    head = f"[{passage.number}] {printable(passage.title)} · {printable(passage.section)}"
    parts: list[Content | tuple[str, str]] = [(head, "bold $primary" if cited else "bold $muted")]
    if cited:
        parts.append(("  已引用", "$primary"))
    parts.append(("\n" + printable("".join(passage.sentences)), "$foreground" if cited else "$muted"))
    parts += [("\n" + printable(source_line(source)), "$faint") for source in passage.sources]
    return Content.assemble(*parts)
