"""The Modelfile for Ollama, whose template is proven against the model's own or not written at all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize import chat
from quantize.chat import TemplateFailed

# More than this costs memory from the first question on; Ollama reserves the whole context.
_MOST_CONTEXT = 4096
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """A chat template of the plain kind: each message stands between two fixed texts of its role."""

    around: Mapping[str, tuple[str, str]]
    answer: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation with the opening of an answer."""
        return "".join(m["content"].join(self.around[m["role"]]) for m in messages) + self.answer

    def go(self) -> str:
        """As Ollama writes it, in the template language of Go."""
        before, after = self.around["user"]
        if all(self.around[role] == (before.replace("user", role), after) for role in _ROLES) and "user" in before:
            turn = before.replace("user", "{{ .Role }}") + "{{ .Content }}" + after
        else:
            system, user, assistant = ("{{ .Content }}".join(self.around[role]) for role in _ROLES)
            turn = f'{{{{ if eq .Role "system" }}}}{system}{{{{ else if eq .Role "user" }}}}{user}'
            turn += f"{{{{ else }}}}{assistant}{{{{ end }}}}"
        return "{{- range .Messages }}" + turn + "{{ end }}" + self.answer


def turns(template: str, eos: str, bos: str) -> Turns | None:
    """Takes a Jinja template apart, puts it together again, and returns it only when both render the same text.

    `bos` is empty when llama.cpp adds it by itself, as it does for Ollama too.
    None for a template that looks beyond the single message (or writes what Go would read as its own).
    """
    template = f"{{%- set eos_token = {json.dumps(eos)} -%}}{{%- set bos_token = {json.dumps(bos)} -%}}{template}"
    try:
        found = _take_apart(template)
        if found is None or any("{{" in text or '"""' in text for text in _texts(found)):
            return None
        same = all(found.render(c) == chat.render(template, c, answer_next=True) for c in _conversations())
    except TemplateFailed:
        return None
    return found if same else None


def modelfile(
    first: str,
    others: Sequence[str],
    adapters: Mapping[str, str],
    template: Turns | None,
    stops: Sequence[str],
    context: int | None,
    prompts: Mapping[str, Any] | None,
) -> str:
    """The whole file. `first`: the model file it starts from; `adapters`: task → file; `prompts`: our contract's.

    `template` None: it could not be proven. `context`: tokens the model was made for.
    """
    lines = [f"FROM ./{first}"]
    if template is None:
        lines += [
            "# Ollama's template language cannot repeat this model's chat template provably; Ollama will guess one.",
            "# Write a TEMPLATE by hand and compare its text with the model's own before you rely on an answer.",
        ]
    else:
        lines.append(f'TEMPLATE """{template.go()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append("PARAMETER temperature 0")
    if context:
        lines.append(f"PARAMETER num_ctx {min(context, _MOST_CONTEXT)}")
    if prompts is not None:
        system = prompts["system_prompt"] + next(iter(prompts["task_prompts"].values()))
        lines.append(f'SYSTEM """{system}"""')
    if adapters:
        lines.append("# One task's experts instead of the compromise for all tasks; one line at most:")
        lines += [f"# ADAPTER ./{file}" for file in adapters.values()]
    if others:
        lines.append("# The same model in other sizes, for the first line:")
        lines += [f"# FROM ./{other}" for other in others]
    return "\n".join(lines) + "\n"


def _take_apart(template: str) -> Turns | None:
    """From the shortest conversation to longer ones, each must begin or end with what is known already."""

    def rendered(*roles: str, answer_next: bool = False) -> str:
        return chat.render(template, [_message(role, 0) for role in roles], answer_next=answer_next)

    def split(text: str, role: str) -> tuple[str, str] | None:
        before, found, after = text.partition(_message(role, 0)["content"])
        return (before, after) if found else None

    question = rendered("user")
    user = split(question, "user")
    dialogue, opened = rendered("user", "assistant"), rendered("user", answer_next=True)
    instructed = rendered("system", "user")
    if not (dialogue.startswith(question) and opened.startswith(question) and instructed.endswith(question)):
        return None
    assistant = split(dialogue.removeprefix(question), "assistant")
    system = split(instructed.removesuffix(question), "system")
    if user is None or assistant is None or system is None:
        return None
    return Turns({"system": system, "user": user, "assistant": assistant}, opened.removeprefix(question))


def _conversations() -> list[list[dict[str, str]]]:
    """Up to three questions, with and without instructions."""
    dialogue = [_message(role, n) for n, role in enumerate(("user", "assistant") * 3)]
    lengths = (1, 3, 5)
    return [system + dialogue[:length] for system, length in itertools.product(([], [_message("system", 9)]), lengths)]


def _message(role: str, number: int) -> dict[str, str]:
    return {"role": role, "content": f"{role} 说{number}：38.5℃"}


def _texts(found: Turns) -> list[str]:
    return [found.answer, *itertools.chain.from_iterable(found.around.values())]
