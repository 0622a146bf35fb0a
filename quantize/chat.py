"""A GGUF's chat template, rendered so that text can never become a control token.

The messages' contents are replaced by sentinels, the rendering is split at the control tokens' texts, and
only then the contents are put back into the plain parts.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SENTINEL = re.compile("\ue000(\\d+)\ue001")
# What a template of unknown origin raises besides Jinja's own errors; the sandbox itself refuses long ranges so.
_FOREIGN = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


class TemplateFailed(Exception):
    """The template cannot be rendered, or drops a message."""


def render(template: str, messages: list[dict[str, str]], *, answer_next: bool = False) -> str:
    """The plain rendering, with the Jinja settings Hugging Face and llama.cpp use. Raises TemplateFailed."""
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=answer_next)
    except (TemplateError, *_FOREIGN) as error:
        raise TemplateFailed(f"the chat template cannot be rendered: {error}") from error


@functools.lru_cache(maxsize=8)  # one template is rendered hundreds of times in an export
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: Any) -> None:
        raise TemplateFailed(f"the chat template refuses the conversation: {message}")

    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def segments(
    template: str, messages: list[dict[str, str]], control: list[str], *, answer_next: bool = False
) -> list[list[str]]:
    """["plain" | "control", text] pairs of a conversation, in order. Raises TemplateFailed."""
    marked = [{**message, "content": f"\ue000{n}\ue001"} for n, message in enumerate(messages)]
    rendered = render(template, marked, answer_next=answer_next)
    if sorted(int(n) for n in _SENTINEL.findall(rendered)) != list(range(len(messages))):
        raise TemplateFailed("the chat template drops or repeats a message")
    named = sorted(filter(None, control), key=len, reverse=True)
    # An expression without alternatives would split between all letters.
    found = re.split("(" + "|".join(map(re.escape, named)) + ")", rendered) if named else [rendered]
    parts = []
    for part in found:
        if part in named:
            parts.append(["control", part])
        elif part:
            parts.append(["plain", _SENTINEL.sub(lambda match: messages[int(match[1])]["content"], part)])
    return parts


def is_chatml(template: str) -> bool:
    """Whether the template writes ChatML, the format the Ollama template of the distribution repeats."""
    messages = [{"role": role, "content": f"{role} text"} for role in ("system", "user", "assistant", "user")]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return render(template, messages, answer_next=True) == expected + "<|im_start|>assistant\n"
