"""What a checkpoint folder says about its tokenizer besides the tokenizer itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantize.errors import BadInput
from quantize.run_folder import read_object


@dataclass(frozen=True)
class Settings:
    """tokenizer_config.json and, for what it does not name, special_tokens_map.json."""

    folder: Path
    values: dict[str, Any]
    special_tokens: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Raises BadInput when a file is damaged; both may be missing."""
        return cls(folder, optional(folder / "tokenizer_config.json"), optional(folder / "special_tokens_map.json"))

    @property
    def add_bos(self) -> bool:
        return self.values.get("add_bos_token") is True

    def text(self, key: str) -> str | None:
        """The text of a special token such as `eos_token`, which may be an object with more in it."""
        value = self.values.get(key) or self.special_tokens.get(key)
        return value.get("content") if isinstance(value, dict) else value

    def special(self, key: str, ids: dict[str, int]) -> int | None:
        """The id of a special token. Raises BadInput when its text is no token."""
        text = self.text(key)
        if text is not None and text not in ids:
            raise BadInput(
                f"{self.folder / 'tokenizer_config.json'}: {key} {text!r} is not in the vocabulary; correct it or save "
                "the tokenizer again."
            )
        return None if text is None else ids[text]


def optional(file: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    return read_object(file) if file.is_file() else {}


def open_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json as its own library reads it. Raises BadInput when it does not."""
    try:
        state = file.stat()
        return _opened(str(file), state.st_mtime_ns, state.st_size)
    except Exception as error:  # the library raises nothing more specific
        raise BadInput(f"{file} cannot be read ({error}); save the tokenizer again.") from error


@functools.lru_cache(maxsize=1)  # a real vocabulary takes a third of a second, and several checks ask for it
def _opened(file: str, _changed: int, _size: int) -> Tokenizer:
    return Tokenizer.from_file(file)
