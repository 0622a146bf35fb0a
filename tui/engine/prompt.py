"""From messages to token ids: the model's chat template around texts that can never become control tokens.

The template is rendered with sentinels in place of the messages' contents. Only what the template itself wrote is
split at the texts of control tokens; the contents go back inside the plain segments and are tokenised as plain text,
so `<|im_end|>` typed by a user stays nine characters. For ordinary text the ids equal those of Hugging Face's
`apply_chat_template`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tui.engine.contract import EngineError


class Tokeniser(Protocol):
    """What prompt building needs of a vocabulary."""

    def tokenise(self, text: str) -> list[int]:
        """Ids of plain text; control tokens in it are not recognised."""
        ...

    @property
    def controls(self) -> Mapping[str, int]:
        """Text of each control token -> its id."""
        ...

    @property
    def named(self) -> Mapping[str, str]:
        """Texts of the tokens that templates know by name: bos_token, eos_token, pad_token, unk_token."""
        ...

    @property
    def begin(self) -> int | None:
        """The id every prompt must begin with, None for most vocabularies."""
        ...


@dataclass(frozen=True)
class Message:
    """One message; `tokens` are the ids the model itself generated for exactly this content, where known."""

    role: str
    content: str
    tokens: tuple[int, ...] | None = None


def _sentinel(index: int) -> str:
    # Private-use characters: no template tests for them, and stripping white space leaves them alone.
    return f"\ue000{index}\ue001"


_SENTINEL = re.compile("\ue000(\\d+)\ue001")


class ChatTemplate:
    """A model's chat template, rendered in a sandbox."""

    def __init__(self, source: str, tokeniser: Tokeniser) -> None:
        """Compile and try; raises EngineError for a template that cannot write a conversation."""
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], undefined=jinja2.ChainableUndefined
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise EngineError(f"模型的对话模板有错（{error}），请换一个模型。") from error
        self._tokeniser = tokeniser
        longest_first = sorted(tokeniser.controls, key=len, reverse=True)
        self._controls = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self.folds_system = False  # the template refuses or drops a system message: the user says it
        probe = [Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "u")]
        try:
            self.tokens(probe)
        except EngineError:
            self.folds_system = True
            self.tokens(probe)

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt up to where the model answers; raises EngineError when the template refuses."""
        if self.folds_system and messages[0].role == "system":
            system, first, *rest = messages
            messages = [Message("user", f"{system.content}\n\n{first.content}"), *rest]
        text = self._render(messages)
        parts = self._controls.split(text) if self._controls else [text]
        found: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                found.append(self._tokeniser.controls[part])
            else:
                found += self._plain(part, messages)
        if self._tokeniser.begin is not None and found[:1] != [self._tokeniser.begin]:
            found.insert(0, self._tokeniser.begin)
        return found

    def _render(self, messages: Sequence[Message]) -> str:
        import jinja2

        stand_ins = [{"role": message.role, "content": _sentinel(index)} for index, message in enumerate(messages)]
        options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False, "tools": None}
        try:
            text = self._template.render(messages=stand_ins, **self._tokeniser.named, **options)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise EngineError(f"模型的对话模板不能用于本程序的对话（{error}），请换一个模型。") from error
        if sorted(int(number) for number in _SENTINEL.findall(text)) != list(range(len(messages))):
            raise EngineError("模型的对话模板丢掉或重复了消息，请换一个模型。")
        return text

    def _plain(self, part: str, messages: Sequence[Message]) -> list[int]:
        """Put the contents back and tokenise; a content whose ids are known is cut out and keeps them."""
        found: list[int] = []
        text = ""
        for index, piece in enumerate(_SENTINEL.split(part)):
            if index % 2 == 0:
                text += piece
                continue
            message = messages[int(piece)]
            if message.tokens is None:
                text += message.content
            else:
                found += [*self._tokeniser.tokenise(text), *message.tokens]
                text = ""
        return found + self._tokeniser.tokenise(text)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
