"""What parent and child agree on: the prompts that travel in a GGUF and the description of a loaded model."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

CONTRACT = 1
DEFAULT_PROMPTS = Path(__file__).parent / "default_prompts.json"


def sanitised(text: str) -> str:
    """Text that cannot steer a terminal: no control characters but line feed and tab, no direction overrides."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


class EngineError(Exception):
    """The model cannot be loaded or has stopped answering; the message is one sentence with the remedy.

    Messages quote files, templates and logs; what could steer a terminal is removed from them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(sanitised(message).splitlines()))


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
    free_system_prompt: str  # where there are no passages to keep to; optional in files, then the system_prompt

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Prompts:
        """Build from the parsed prompts.json form; raises KeyError for a missing part."""
        return cls(
            raw["system_prompt"],
            dict(raw["task_prompts"]),
            raw["passage_template"],
            raw["question_template"],
            Phrases.of(raw["phrases"]),
            raw.get("free_system_prompt", raw["system_prompt"]),
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
            raw = {name: metadata[key] for name in _KEYS if (key := f"pediatricsgpt.{name}") in metadata}
            for name in ("task_prompts", "phrases"):
                raw[name] = json.loads(raw[name])
            prompts = cls.of(raw)
            prompts._try()
            return prompts
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise EngineError(
                f"模型文件的提示词不完整或有错（{error}），请用 pediatricsgpt quantize 重新导出。"
            ) from error

    def system(self, task: str, *, grounded: bool = True) -> str:
        """The system message of a task; not `grounded`: without passages."""
        return (self.system_prompt if grounded else self.free_system_prompt) + self.task_prompts.get(task, "")

    def question(self, question: str, passages: str) -> str:
        """The user message: the question behind the passages already written by `passage`."""
        return Template(self.question_template).substitute(passages=passages, question=question)

    def passage(self, number: int, title: str, section: str, sentences: tuple[str, ...]) -> str:
        """One passage as it stands in the prompt, ending with a newline."""
        text = "".join(sentence + "\n" for sentence in sentences)
        return Template(self.passage_template).substitute(number=number, title=title, section=section, text=text)

    def _try(self) -> None:
        """Write one message of each kind; raises KeyError, TypeError or ValueError where that is impossible."""
        passage = self.passage(1, "题", "节", ("句。",))
        before, found, after = self.question("问？", passage).partition(passage)
        if not found or "句。" not in passage or "问？" not in before + after:
            raise ValueError("模板丢掉了资料或问题")
        phrases = dataclasses.astuple(self.phrases)
        texts = [self.system_prompt, self.free_system_prompt, *self.task_prompts.values(), *phrases]
        for text in texts:
            if not all(isinstance(part, str) for part in (text if isinstance(text, tuple) else (text,))):
                raise TypeError("提示词不是文字")


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
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for the protocol; `of_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> ModelInfo:
        """Inverse of `to_json`; what a file says about itself is made safe for a terminal."""
        texts = {name: sanitised(raw[name]) for name in ("name", "architecture", "quant")}
        notes = tuple(map(sanitised, raw["notes"]))
        return cls(**{**raw, **texts, "prompts": Prompts.of(raw["prompts"]), "notes": notes})
