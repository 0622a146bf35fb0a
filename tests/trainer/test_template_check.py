"""What is refused in a chat template before anything is trained with it."""

from __future__ import annotations

import copy

import pytest
from transformers import PreTrainedTokenizerFast

from trainer import prompts
from trainer.recipe import RecipeError, TokenizerRecipe
from trainer.stages.template import check_template
from trainer.tokenizer import train_tokenizer

OURS = prompts.chat_template()
# Like Qwen3's own: what stands in an earlier turn depends on whether a later one follows.
LOOKS_AHEAD = OURS.replace(
    "message['content'] + '<|im_end|>'", "('' if loop.last else '(早)') + message['content'] + '<|im_end|>'"
)
UNMARKED = OURS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
END_OUTSIDE = OURS.replace(
    "+ '<|im_end|>' -}}{% endgeneration %}{{- '\\n' -}}", "-}}{% endgeneration %}{{- '<|im_end|>\\n' -}}"
)
USER_MARKED = OURS.replace(
    "{{- '<|im_start|>' + message['role']", "{% generation %}{{- '<|im_start|>' + message['role']"
).replace("message['content'] + '<|im_end|>\\n' -}}", "message['content'] + '<|im_end|>\\n' -}}{% endgeneration %}")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["甲乙丙丁戊"], TokenizerRecipe(vocab_size=400), 128)


def _with(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_ours_passes(tokenizer: PreTrainedTokenizerFast) -> None:
    check_template(tokenizer)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        (None, "no chat template"),
        (UNMARKED, "does not mark the assistant's tokens"),
        (END_OUTSIDE, "is outside the marked tokens"),
        (USER_MARKED, "marks .* where the assistant said"),
        (LOOKS_AHEAD, "not append-only"),
        ("{{ raise_exception('no system role') }}", "cannot be rendered .*no system role"),
    ],
)
def test_is_refused_with_its_cause(tokenizer: PreTrainedTokenizerFast, template: str | None, cause: str) -> None:
    assert template != OURS  # the replacements above have found their place
    with pytest.raises(RecipeError, match=cause):
        check_template(_with(tokenizer, template))


def test_another_eos_than_the_template_writes_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    changed = _with(tokenizer, OURS)
    changed.eos_token = "<|endoftext|>"
    with pytest.raises(RecipeError, match="set eos_token"):
        check_template(changed)
