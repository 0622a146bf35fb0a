"""The one home of the prompts: what the model is trained on travels in the GGUF and is what the app sends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import Template
from typing import Any, Protocol

PROMPTS_FILE = Path(__file__).parent / "prompts.json"
CHAT_TEMPLATE_FILE = Path(__file__).parent / "chat_template.jinja"
BAICHUAN_TEMPLATE_FILE = Path(__file__).parent / "baichuan_template.jinja"


class HasPassage(Protocol):
    """What a passage must have to be written into a prompt."""

    @property
    def title(self) -> str: ...
    @property
    def section(self) -> str: ...
    @property
    def sentences(self) -> Sequence[str]: ...


@cache
def prompts() -> dict[str, Any]:
    """The prompt contract as written into every run folder (`prompts.json`)."""
    return json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))


def chat_template() -> str:
    """The training chat template (with the `generation` tags that mark assistant tokens)."""
    return CHAT_TEMPLATE_FILE.read_text(encoding="utf-8").strip()


def baichuan_template() -> str:
    """The same for Baichuan's vocabulary, which has its own turn tokens."""
    return BAICHUAN_TEMPLATE_FILE.read_text(encoding="utf-8").strip()


def system(task: str) -> str:
    """System message of a consultation task (`knowledge`, `diagnosis` or `treatment`)."""
    return prompts()["system_prompt"] + prompts()["task_prompts"][task]


def lines(sentences: Sequence[str]) -> str:
    """One sentence per line: so the tokens of a sentence do not depend on its neighbours."""
    return "".join(f"{sentence}\n" for sentence in sentences)


def user(question: str, passages: Sequence[HasPassage]) -> str:
    """User message: the numbered passages, then the question."""
    template = Template(prompts()["passage_template"])
    written = "".join(
        template.substitute(number=number, title=passage.title, section=passage.section, text=lines(passage.sentences))
        for number, passage in enumerate(passages, 1)
    )
    return Template(prompts()["question_template"]).substitute(passages=written, question=question)


def answer(number: int, passage: HasPassage, sentences: Sequence[str], opening: str = "", closing: str = "") -> str:
    """An answer that cites `passage` (number `number` in the prompt) and quotes some of its sentences."""
    cite = Template(prompts()["phrases"]["cite"])
    cited = cite.substitute(number=number, title=passage.title, section=passage.section)
    return opening + cited + lines(sentences) + closing
