"""What parent and child agree on: the prompts that travel in a GGUF and the description of a loaded model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

CONTRACT = 1
DEFAULT_PROMPTS = Path(__file__).parent / "default_prompts.json"


class EngineError(Exception):
    """The model cannot be loaded or has stopped answering; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Phrases:
    """The fixed phrases quote mode may use besides sentences of the passages; each ends with a newline."""

    cite: str
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    refusal: str
    identity: str
    prescription: str = ""  # to who asks for a prescription; empty in models that know no such phrase

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Phrases:
        """Build from the JSON form; raises KeyError for a missing phrase."""
        return cls(
            raw["cite"],
            tuple(raw["openings"]),
            tuple(raw["closings"]),
            raw["refusal"],
            raw["identity"],
            raw.get("prescription", ""),
        )


@dataclass(frozen=True)
class Prompts:
    """How messages are written for a model (see trainer/prompts)."""

    system_prompt: str
    task_prompts: Mapping[str, str]
    passage_template: str
    question_template: str
    phrases: Phrases

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Prompts:
        """Build from the parsed prompts.json form; raises KeyError for a missing part."""
        return cls(
            raw["system_prompt"],
            dict(raw["task_prompts"]),
            raw["passage_template"],
            raw["question_template"],
            Phrases.of(raw["phrases"]),
        )

    @classmethod
    def builtin(cls) -> Prompts:
        """The prompts for a foreign model, a generated copy of trainer/prompts/instruct.json."""
        return cls.of(json.loads(DEFAULT_PROMPTS.read_text(encoding="utf-8")))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Prompts | None:
        """Read the pediatricsgpt.* keys of a GGUF; None for a foreign model.

        Raises EngineError for a contract this app does not know or incomplete prompts.
        """
        if (contract := metadata.get("pediatricsgpt.contract")) is None:
            return None
        if contract != CONTRACT:
            raise EngineError(f"模型的提示词约定是第 {contract} 版，本程序只认识第 {CONTRACT} 版，请更新程序。")
        try:
            raw = {name: metadata[f"pediatricsgpt.{name}"] for name in _KEYS}
            for name in ("task_prompts", "phrases"):
                raw[name] = json.loads(raw[name])
            return cls.of(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"模型文件的提示词不完整（{error}），请用 pediatricsgpt quantize 重新导出。") from error

    def system(self, task: str) -> str:
        """The system message of a task."""
        return self.system_prompt + self.task_prompts.get(task, "")

    def question(self, question: str, passages: str) -> str:
        """The user message: the question behind the passages already written by `passage`."""
        return Template(self.question_template).substitute(passages=passages, question=question)

    def passage(self, number: int, title: str, section: str, sentences: tuple[str, ...]) -> str:
        """One passage as it stands in the prompt, ending with a newline."""
        text = "".join(sentence + "\n" for sentence in sentences)
        return Template(self.passage_template).substitute(number=number, title=title, section=section, text=text)


_KEYS = tuple(item.name for item in dataclasses.fields(Prompts))


@dataclass(frozen=True)
class ModelInfo:
    """What the child reports about the model it has loaded."""

    name: str
    architecture: str
    size_bytes: int
    parameters: int
    context: int  # tokens of this session, not the trained maximum
    quant: str
    demonstration: bool
    prompts: Prompts
    foreign: bool  # True: no pediatricsgpt keys, the built-in prompts are used
    sampling: Mapping[str, float] = field(default_factory=dict)  # empty: greedy
    threads: int = 1
    load_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for the protocol; `of_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> ModelInfo:
        """Inverse of `to_json`."""
        return cls(**{**raw, "prompts": Prompts.of(raw["prompts"]), "notes": tuple(raw["notes"])})
