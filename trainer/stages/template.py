"""What training asks of a chat template: it marks what is scored, it ends turns, it only ever appends."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainer.recipe import RecipeError

_TURNS = [
    {"role": "system", "content": "甲"},
    {"role": "user", "content": "乙"},
    {"role": "assistant", "content": "丙"},
    {"role": "user", "content": "丁"},
    {"role": "assistant", "content": "戊"},
]


class ChatTemplateError(RecipeError):
    """A chat template that cannot be trained with; the message names the cause and the remedy."""


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Renders a dialogue of two turns and looks at its tokens.

    Raises ChatTemplateError when there is no template or it cannot be rendered, when the assistant's tokens are not
    marked or others are, when the token that ends a turn is not among them (the model would never learn to stop), or
    when a longer dialogue does not begin with the tokens of a shorter one (training, evaluation and the app would
    see different tokens).
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "The tokenizer has no chat template, so dialogues cannot be written in its tokens. Put a "
            "chat_template.jinja beside its tokenizer.json; trainer/prompts has one."
        )
    both = _render(tokenizer, _TURNS, return_assistant_tokens_mask=True)
    spans = _spans(both["input_ids"], both["assistant_masks"])
    if not spans:
        raise ChatTemplateError(
            "The chat template does not mark the assistant's tokens, so nothing would be trained. Enclose the answer "
            "and the token that ends it with {% generation %} … {% endgeneration %}; the template of trainer/prompts "
            "shows how."
        )
    answers = [turn["content"] for turn in _TURNS if turn["role"] == "assistant"]
    marked = [str(tokenizer.decode(span)) for span in spans]
    if len(spans) != len(answers) or not all(answer in text for answer, text in zip(answers, marked, strict=True)):
        raise ChatTemplateError(
            f"The chat template marks {marked} where the assistant said {answers}. Put {{% generation %}} before each "
            "answer and {% endgeneration %} behind the token that ends it, inside the loop over the messages."
        )
    if any(tokenizer.eos_token_id not in span for span in spans):
        raise ChatTemplateError(
            f"The token that ends a turn ({tokenizer.eos_token}) is outside the marked tokens, so the model would "
            "never learn to stop. Move {% endgeneration %} behind it, or set eos_token to the token the template ends "
            "turns with."
        )
    for count in range(2, len(_TURNS)):
        shorter = _render(tokenizer, _TURNS[:count], add_generation_prompt=_TURNS[count]["role"] == "assistant")
        if both["input_ids"][: len(shorter["input_ids"])] != shorter["input_ids"]:
            raise ChatTemplateError(
                f"The chat template is not append-only: a dialogue of {len(_TURNS)} messages does not begin with the "
                f"tokens of its first {count}, so answers would be trained behind other tokens than they are asked for "
                "with. Render each message without looking at those behind it."
            )


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> dict[str, list[int]]:
    try:
        rendered: Any = tokenizer.apply_chat_template(turns, return_dict=True, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise ChatTemplateError(
            f"The chat template cannot be rendered ({error}). It must write messages of the roles system, user and "
            "assistant in their order."
        ) from None
    return rendered


def _spans(ids: list[int], marks: list[int]) -> list[list[int]]:
    """Runs of marked tokens."""
    spans: list[list[int]] = []
    before = 0
    for token, mark in zip(ids, marks, strict=True):
        if mark and not before:
            spans.append([])
        if mark:
            spans[-1].append(token)
        before = mark
    return spans
