"""The PedCorpus record: one JSON line, unknown keys are errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

Task = Literal["knowledge", "diagnosis", "treatment", "general", "safety", "identity"]
Split = Literal["train", "held_out_questions", "held_out_cards"]


class CorpusError(ValueError):
    """A corpus or card file that cannot be used; the message names file, line and remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(_Strict):
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str


class Source(_Strict):
    """Where a record's facts come from."""

    name: str
    licence: str
    reference: str


class Record(_Strict):
    """One training or evaluation example; `group` is what must never cross splits (a card id)."""

    id: str
    kind: Literal["text", "dialogue", "preference"]
    task: Task
    source: Source
    age_group: str
    split: Split
    group: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt: tuple[Message, ...] | None = None
    chosen: tuple[Message, ...] | None = None
    rejected: tuple[Message, ...] | None = None

    @model_validator(mode="after")
    def _has_the_fields_of_its_kind(self) -> Record:
        needed = {"text": {"text"}, "dialogue": {"messages"}, "preference": {"prompt", "chosen", "rejected"}}[self.kind]
        present = {name for name in ("text", "messages", "prompt", "chosen", "rejected") if getattr(self, name)}
        if present != needed:
            raise ValueError(f"a {self.kind} record carries {sorted(needed)}, this one carries {sorted(present)}")
        return self


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Writes records as JSON Lines (UTF-8, only the fields that are set); returns their number."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(record.model_dump_json(exclude_none=True) + "\n")
            count += 1
    return count


def read_records(path: Path) -> Iterator[Record]:
    """Reads records; raises CorpusError with the line number of the first bad one."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield Record.model_validate_json(line)
                except ValidationError as error:
                    first = error.errors()[0]
                    where = ".".join(map(str, first["loc"]))
                    raise CorpusError(f"{path}, line {number}: {where}: {first['msg']}. Rebuild the corpus.") from None
    except UnicodeDecodeError:
        raise CorpusError(f"{path} is not UTF-8 text. Rebuild the corpus.") from None
    except FileNotFoundError:
        raise CorpusError(f"{path} is missing. Build it with `pediatricsgpt corpus RECIPE`.") from None
