"""Card files: Markdown with front matter, one condition or topic per file, read strictly.

A card is reviewed text; whatever is not exactly in the format is an error naming file and cause, because a
half-read card would answer questions with half its warnings.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTIONS = ("概述", "表现", "判断", "处理", "家庭护理", "转诊", "预防")
CARDS = Path(__file__).parent / "cards"
_CITATION = re.compile(r"\[\^([^\]\s]+)\]")
_HEADING = re.compile(r"^## *(.+?) *$", re.MULTILINE)


class LibraryError(Exception):
    """A card file cannot be used; the message names the file and the cause."""


@dataclass(frozen=True)
class Source:
    """Where a statement comes from."""

    key: str
    title: str
    edition: str
    organisation: str


@dataclass(frozen=True)
class Card:
    """One condition or topic."""

    id: str
    title: str
    english: str
    ages: str
    synonyms: tuple[str, ...]
    symptoms: tuple[str, ...]
    asked: Mapping[str, tuple[str, ...]]  # heading -> short questions that this section answers (may be empty)
    red_flags: tuple[str, ...]
    sources: tuple[Source, ...]
    sections: Mapping[str, tuple[str, ...]]  # heading -> sentences, in the order of the file
    citations: Mapping[str, tuple[Source, ...]]  # heading -> the sources cited there

    @property
    def names(self) -> tuple[str, ...]:
        """Title, synonyms and English title: everything by which the card may be named."""
        return (self.title, *self.synonyms, self.english)


def sentences(text: str) -> tuple[str, ...]:
    """Split a paragraph after each 。; citation marks and line breaks are removed."""
    plain = re.sub(r"\s*\n\s*", "", _CITATION.sub("", text))
    return tuple(part.strip() for part in re.findall(r"[^。]+。?", plain) if part.strip())


def read_card(path: Path) -> Card:
    """Read one card; raises LibraryError naming the file and the cause."""
    import frontmatter  # takes 40 ms: only when cards are read
    import yaml

    try:
        metadata, body = frontmatter.parse(path.read_text(encoding="utf-8"))
        return _card(path, metadata, body)
    except OSError as error:
        raise LibraryError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise LibraryError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise LibraryError(f"{path}: front matter is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise LibraryError(f"{path}: {error}") from error


def load_cards(folder: Path = CARDS) -> dict[str, Card]:
    """Read every *.md of a folder, by id in the order of file names; raises LibraryError."""
    cards: dict[str, Card] = {}
    for path in sorted(folder.glob("*.md")):
        card = read_card(path)
        cards[card.id] = card
    if not cards:
        raise LibraryError(f"{folder}: contains no cards (*.md); reinstall the app.")
    return cards


def _card(path: Path, metadata: Mapping[str, Any], body: str) -> Card:
    """Build a card from parsed parts; raises ValueError with the cause."""
    if not metadata:
        raise ValueError("front matter between two lines '---' is missing.")
    if (identity := _string(metadata, "id")) != path.stem:
        raise ValueError(f"id {identity!r} differs from the file name.")
    sources = {source.key: source for source in _sources(metadata)}
    parts = _HEADING.split(body)
    if parts[0].strip():
        raise ValueError("there is text before the first '## ' heading.")
    sections: dict[str, tuple[str, ...]] = {}
    citations: dict[str, tuple[Source, ...]] = {}
    for heading, paragraph in zip(parts[1::2], parts[2::2], strict=True):
        if heading not in SECTIONS or heading in sections:
            raise ValueError(f"section {heading!r} is unknown or stands twice; sections are {' '.join(SECTIONS)}.")
        if unknown := [key for key in _CITATION.findall(paragraph) if key not in sources]:
            raise ValueError(f"section {heading!r} cites {unknown[0]!r}, which is not among the sources.")
        sections[heading] = sentences(paragraph)
        citations[heading] = tuple(sources[key] for key in dict.fromkeys(_CITATION.findall(paragraph)))
        if not sections[heading]:
            raise ValueError(f"section {heading!r} is empty.")
    if not sections:
        raise ValueError("there is no '## ' section.")
    card = Card(
        id=identity,
        title=_string(metadata, "title"),
        english=_string(metadata, "english"),
        ages=_string(metadata, "ages"),
        synonyms=_strings(metadata, "synonyms"),
        symptoms=_strings(metadata, "symptoms"),
        asked=_asked(metadata, sections),
        red_flags=_strings(metadata, "red_flags"),
        sources=tuple(sources.values()),
        sections=sections,
        citations=citations,
    )
    _refuse_control_characters(card)
    return card


def _refuse_control_characters(card: Card) -> None:
    """A card's text is shown in a terminal: control and direction characters have no business there."""
    texts = [*card.names, card.ages, *card.symptoms, *card.red_flags]
    texts += [phrase for phrases in card.asked.values() for phrase in phrases]
    texts += [part for source in card.sources for part in (source.title, source.edition, source.organisation)]
    texts += [sentence for group in card.sections.values() for sentence in group]
    for character in "".join(texts):
        if unicodedata.category(character) in ("Cc", "Cf"):
            raise ValueError(f"contains the control character U+{ord(character):04X}.")


def _string(metadata: Mapping[str, Any], name: str) -> str:
    value = metadata.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"front matter needs {name!r} as text.")
    return value.strip()


def _strings(metadata: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = metadata.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"front matter needs {name!r} as a list of texts (put quotes around numbers).")
    return tuple(value)


def _asked(metadata: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The optional `asked`: short questions per section."""
    raw = metadata.get("asked", {})
    if not isinstance(raw, dict):
        raise ValueError("front matter has 'asked', but not as a mapping from sections to lists of questions.")
    if unknown := set(raw) - set(sections):
        raise ValueError(f"'asked' names the section {min(map(str, unknown))!r}, which the card does not have.")
    return {str(heading): _strings(raw, heading) for heading in raw}


def _sources(metadata: Mapping[str, Any]) -> list[Source]:
    raw = metadata.get("sources")
    if not isinstance(raw, list) or not raw:
        raise ValueError("front matter needs 'sources' as a list.")
    sources = []
    for item in raw:
        try:
            sources.append(Source(*(str(item[name]) for name in ("key", "title", "edition", "organisation"))))
        except (KeyError, TypeError) as error:
            raise ValueError(f"each source needs key, title, edition and organisation, not {item!r}.") from error
    return sources
