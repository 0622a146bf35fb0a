"""The source of an export: a run folder as `pediatricsgpt train` leaves it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import BadInput

CONTRACT = 1
# A model's name becomes file names.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ROLES = {"system", "user", "assistant"}
_PROMPT_TYPES = {
    "system_prompt": str,
    "task_prompts": dict,
    "passage_template": str,
    "question_template": str,
    "phrases": dict,
    "demonstration": bool,
}


@dataclass(frozen=True)
class Dialogue:
    """One calibration dialogue: its task and its chat messages."""

    task: str
    messages: list[dict[str, str]]


@dataclass(frozen=True)
class RunFolder:
    """A validated run folder; nothing but small JSON files is read when it is opened."""

    path: Path
    name: str
    run: dict[str, Any]
    prompts: dict[str, Any]
    calibration: list[Dialogue]
    held_out: list[Dialogue]

    @property
    def checkpoint(self) -> Path:
        """The model the experts were trained on."""
        return self.path / "3-dfpo"

    @property
    def adapter(self) -> Path:
        """The MUE adapter."""
        return self.path / "4-mue"

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Reads and checks the folder's description. Raises BadInput when a part is missing or unreadable."""
        if not path.is_dir():
            raise BadInput(f"There is no run folder {path}; `pediatricsgpt train RECIPE` makes one under runs/.")
        for part, stage in (
            ("3-dfpo/config.json", "dfpo"),
            ("3-dfpo/tokenizer.json", "dfpo"),
            ("4-mue/adapter_config.json", "mue"),
            ("4-mue/adapter_model.safetensors", "mue"),
        ):
            if not (path / part).is_file():
                raise BadInput(
                    f"{path / part} is missing: the run has not finished its stage {stage}; "
                    "start the same `pediatricsgpt train` command again, it resumes."
                )
        run = read_object(path / "run.json")
        prompts = read_object(path / "prompts.json")
        if prompts.get("contract") != CONTRACT:
            raise BadInput(
                f"{path / 'prompts.json'} has contract {prompts.get('contract')!r}, this program writes contract "
                f"{CONTRACT}; train the run again with this version."
            )
        for key, kind in _PROMPT_TYPES.items():
            if not isinstance(prompts.get(key), kind):
                raise BadInput(f"{path / 'prompts.json'}: `{key}` must be a {kind.__name__}; train the run again.")
        calibration, held_out = path / "calibration.jsonl", path / "held_out.jsonl"
        if not calibration.is_file():
            raise BadInput(f"{calibration} is missing: merging the experts needs it; train the run again.")
        return cls(
            path,
            str(run.get("name") or path.resolve().name),
            run,
            prompts,
            read_dialogues(calibration),
            read_dialogues(held_out) if held_out.is_file() else [],
        )


def file_sha256(path: Path) -> str:
    """sha256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a UTF-8 file. Raises BadInput naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:  # JSON can spell half a character, which no GGUF can hold
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing; copy the whole folder again, or train the run again.") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror or error}); check the file's rights.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable JSON ({error}); copy it again, or train the run again.") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a JSON object; copy it again, or train the run again.")
    return value


def read_dialogues(file: Path) -> list[Dialogue]:
    """Dialogues from JSON lines `{"task": …, "messages": [{"role", "content"}, …]}`; other keys are passed over.

    Raises BadInput naming file and line.
    """
    try:
        # Not splitlines: it also ends a line at characters that JSON may hold inside a text (U+2028, U+0085).
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise BadInput(f"{file} does not exist; give a file of dialogues, one JSON object a line.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 ({error}); save it as UTF-8 or train the run again.") from error
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror or error}); give a file of dialogues.") from error
    dialogues = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            messages = [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
            if not all(m["role"] in _ROLES and isinstance(m["content"], str) for m in messages):
                raise ValueError("a message has an unknown role or no text")
            if not messages or messages[-1]["role"] != "assistant":
                raise ValueError("the dialogue does not end with an answer")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{file}, line {number}: not a dialogue ({error!r}); mend the line or train the run again."
            ) from error
        dialogues.append(Dialogue(str(record.get("task", "")), messages))
    if not dialogues:
        raise BadInput(f"{file} holds no dialogue; merging the experts needs at least one.")
    return dialogues
