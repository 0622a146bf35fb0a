"""The chat template and the tokenizer: append-only, assistant tokens marked, one token per character."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from trainer import prompts
from trainer.corpus.cards import Section
from trainer.recipe import TokenizerRecipe
from trainer.tokenizer import SPECIAL_TOKENS, train_tokenizer

PASSAGE = Section("fever", "发热", "处理", ("发热孩子按体重用药。", "体温38.5℃以上再用。"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = ["发热孩子怎么办，按体重用药。体温以上再", prompts.user("发热怎么办", [PASSAGE])] * 3
    return train_tokenizer(texts, TokenizerRecipe(vocab_size=900), 512)


def _conversation(turns: int) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": prompts.system("knowledge")}]
    for _ in range(turns):
        messages.append({"role": "user", "content": prompts.user("发热怎么办", [PASSAGE])})
        messages.append({"role": "assistant", "content": prompts.answer(1, PASSAGE, PASSAGE.sentences)})
    return messages


def _ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **kwargs) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)["input_ids"]  # type: ignore[index]


def test_special_tokens_have_the_first_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
    assert tokenizer.bos_token_id is None
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def test_rendering_is_append_only(tokenizer: PreTrainedTokenizerFast) -> None:
    for turns in (1, 2, 3):
        longer = _ids(tokenizer, _conversation(turns + 1))
        assert longer[: len(_ids(tokenizer, _conversation(turns)))] == _ids(tokenizer, _conversation(turns))
        prompt = _ids(tokenizer, _conversation(turns)[:-1], add_generation_prompt=True)
        assert _ids(tokenizer, _conversation(turns))[: len(prompt)] == prompt


def test_exactly_the_answers_are_scored(tokenizer: PreTrainedTokenizerFast) -> None:
    both = tokenizer.apply_chat_template(_conversation(2), return_dict=True, return_assistant_tokens_mask=True)
    scored = [
        token
        for token, mark in zip(both["input_ids"], both["assistant_masks"], strict=True)  # type: ignore[index]
        if mark
    ]
    assert tokenizer.decode(scored) == (prompts.answer(1, PASSAGE, PASSAGE.sentences) + "<|im_end|>") * 2


def test_a_sentence_has_the_same_tokens_wherever_it_stands(tokenizer: PreTrainedTokenizerFast) -> None:
    sentence = tokenizer.encode("体温38.5℃以上再用。\n")
    for before in ("发热孩子按体重用药。\n", "根据发热·处理[1]：\n", "您先别着急。\n"):
        assert tokenizer.encode(f"{before}体温38.5℃以上再用。\n") == tokenizer.encode(before) + sentence


@pytest.mark.parametrize("text", ["发热", "罕见字龘", "a b\n\n c", "🙂38.5℃", " 空格 开头"])
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
