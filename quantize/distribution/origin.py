"""What a model was made from and under which licence: from the source's own model card, never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frontmatter
import yaml

from quantize.source import Source

OWN, UNKNOWN = "apache-2.0", "unknown"


@dataclass(frozen=True)
class Origin:
    """The part of a Hugging Face model card's head that is known. `base`: the base's name, for readers."""

    licence: str
    licence_name: str | None = None
    licence_link: str | None = None
    base: str | None = None
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Source) -> Origin:
        """A run that began from nothing is ours; everything else says its licence itself or has an unknown one."""
        base = (source.run.get("recipe") or {}).get("base")
        if source.prompts is not None and not base:
            return cls(OWN, languages=("zh",))
        folder = Path(base) if base else source.checkpoint
        head = _head(folder / "README.md")
        name, link = head.get("license_name"), head.get("license_link")
        return cls(
            licence=str(head.get("license") or UNKNOWN),
            licence_name=str(name) if name else None,
            licence_link=str(link) if link else None,
            base=folder.name if base else None,
            base_models=_strings(head.get("base_model")),
            datasets=_strings(head.get("datasets")),
            languages=("zh",) if source.prompts is not None else _strings(head.get("language")),
        )

    def sentence(self) -> str:
        """The licence, for the end of a card."""
        if self.licence == OWN:
            return "Apache-2.0."
        if self.licence == UNKNOWN:
            return (
                f"Unknown: {self.base or 'the source'} has no model card that states it. Find the licence of the model "
                "it was made from, and write it into the head of this file before you pass the model on."
            )
        link = f" ({self.licence_link})" if self.licence_link else ""
        return f"{self.licence_name or self.licence}{link}, as the model it was made from."


def _head(card: Path) -> dict[str, Any]:
    try:
        return frontmatter.loads(card.read_text(encoding="utf-8")).metadata
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}


def _strings(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, str))
