"""The chat template of a checkpoint: which one counts, made to stand alone in a GGUF, and what ends a turn in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta

from quantize import chat
from quantize.errors import BadInput
from quantize.vocabulary.settings import Settings

_GENERATION_TAG = re.compile(r"(?m)(^[ \t]*)?\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}(\n)?")
_NOBODY_WRITES = "\ue002"
_QUESTION, _ANSWER = "孩子发热怎么办？", "多喝水，观察精神。"


def find(settings: Settings, given: str | None) -> str | None:
    """The template in force, or None: `given`, then chat_template.jinja, then tokenizer_config.json, as transformers.

    Raises BadInput for an unreadable file, for what is no text, and for several templates without a default.
    """
    if given is not None:
        return given
    file = settings.folder / "chat_template.jinja"
    try:
        found = file.read_text(encoding="utf-8") if file.is_file() else settings.values.get("chat_template")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 ({error}); save the tokenizer again.") from error
    if isinstance(found, list):
        return _default(settings.folder, found)
    if found is not None and not isinstance(found, str):
        raise BadInput(
            f"{settings.folder / 'tokenizer_config.json'}: chat_template is a {type(found).__name__}, no text; save "
            "the tokenizer again."
        )
    return found or None


def _default(folder: Path, templates: list[Any]) -> str:
    named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    default = named.get("default")
    if not isinstance(default, str):
        raise BadInput(
            f"{folder / 'tokenizer_config.json'} has the chat templates {', '.join(map(str, named))}, and none is "
            "called default; name one of them so."
        )
    return default


def missing(folder: Path) -> BadInput:
    """The refusal of a folder without a template."""
    return BadInput(
        f"{folder} has no chat template; without one every answer would be in the wrong format. Put the one it was "
        "trained with there as chat_template.jinja."
    )


def prepared(folder: Path, template: str, special: dict[str, str]) -> str:
    """The template as the GGUF carries it: without tags only transformers knows, and with the special tokens it names.

    `special` holds texts by name (`bos_token`); whoever renders the template need not know them. Raises BadInput when
    it is not Jinja.
    """
    template = without_generation_tags(template)
    try:
        names = meta.find_undeclared_variables(Environment().parse(template))
    except TemplateError as error:
        raise BadInput(
            f"{folder}: the chat template cannot be rendered ({error}); save the tokenizer again."
        ) from error
    # The line break belongs to the tag (trim_blocks), so the template itself still begins at the start of a line.
    lines = [
        f"{{% set {name} = {json.dumps(special[name], ensure_ascii=False)} %}}\n" for name in special if name in names
    ]
    return "".join(lines) + template


def turn_end(folder: Path, template: str, control: list[str]) -> str | None:
    """The control token that the template writes after an answer, or None if it writes none.

    Raises BadInput when the template cannot be rendered or does not show both messages of a dialogue.
    """
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        parts = chat.segments(template, messages, control or [_NOBODY_WRITES])
        chat.render(template, messages[:1], answer_next=True)
    except chat.TemplateFailed as error:
        raise BadInput(f"{folder}: {error}. Correct the chat template or put the one of its training there.") from error
    answered = max(number for number, (_, text) in enumerate(parts) if _ANSWER in text)
    return next((text for kind, text in parts[answered:] if kind == "control"), None)


def without_generation_tags(template: str) -> str:
    """The chat template without `{% generation %}`, a tag only Hugging Face's Jinja knows.

    A tag that trims whitespace (`{%-`) becomes an empty comment that trims the same, so the rendering is unchanged.
    """

    def replace(match: re.Match[str]) -> str:
        indent, left, right, newline = match[1] or "", match[2], match[3], match[4] or ""
        return f"{indent}{{#{left} {right}#}}{newline}" if left or right else ""

    return _GENERATION_TAG.sub(replace, template)
