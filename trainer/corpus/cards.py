"""The cards as the trainer reads them: Markdown files with front matter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import frontmatter
import yaml

from trainer.corpus.record import CorpusError

SECTIONS = ("概述", "表现", "判断", "处理", "家庭护理", "转诊", "预防")
_HEADING = re.compile(r"^## +(.+?) *$", re.MULTILINE)
_CITATION = re.compile(r"\[\^[\w.-]+\]")
_SENTENCE = re.compile(r"[^。]+。")


@dataclass(frozen=True)
class Section:
    """One section of a card: what the corpus calls a passage."""

    card_id: str
    title: str
    section: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Card:
    """A card with its sections in the order of the file; `asked` are the short questions each section answers."""

    id: str
    title: str
    names: tuple[str, ...]
    symptoms: tuple[str, ...]
    asked: dict[str, tuple[str, ...]]
    ages: str
    reference: str
    sections: dict[str, Section]


def sentences(paragraph: str) -> tuple[str, ...]:
    """The sentences of a section, without citations; the terminal app quotes exactly these."""
    text = _CITATION.sub("", paragraph).replace("\n", "").strip()
    return tuple(match.strip() for match in _SENTENCE.findall(text))


def load_card(path: Path) -> Card:
    """Reads one card; raises CorpusError naming the file and the cause."""
    try:
        post = frontmatter.loads(path.read_text(encoding="utf-8"))
        meta = post.metadata
        pieces = _HEADING.split(post.content)
        sections = {
            heading: Section(str(meta["id"]), str(meta["title"]), heading, sentences(body))
            for heading, body in zip(pieces[1::2], pieces[2::2], strict=True)
        }
        return Card(
            id=str(meta["id"]),
            title=str(meta["title"]),
            names=(str(meta["title"]), *map(str, meta["synonyms"])),  # type: ignore[arg-type]
            symptoms=tuple(map(str, meta["symptoms"])),  # type: ignore[arg-type]
            asked={str(name): tuple(map(str, phrases)) for name, phrases in meta.get("asked", {}).items()},  # type: ignore[union-attr]
            ages=str(meta["ages"]),
            reference="; ".join(f"{s['title']} ({s['edition']})" for s in meta["sources"]),  # type: ignore[union-attr,index]
            sections={name: section for name, section in sections.items() if section.sentences},
        )
    except UnicodeDecodeError:
        raise CorpusError(f"{path} is not UTF-8 text. Save it as UTF-8.") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path}: the front matter cannot be read ({error}). Compare it with another card.") from None


def load_cards(folder: Path) -> list[Card]:
    """All cards of a folder, sorted by id; raises CorpusError when there is none."""
    cards = [load_card(path) for path in sorted(folder.glob("*.md"))]
    if not cards:
        raise CorpusError(f"{folder} holds no cards (*.md). Give the folder of the library's cards.")
    return cards
