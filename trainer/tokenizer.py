"""A byte-level BPE tokenizer with the Qwen2 pre-tokenizer, trained on the corpus.

Merges are learnt on single characters (and line ends) only: one Chinese character is one token whatever stands
beside it, so the characters of a name are the same tokens in a question and in a passage, which is what a
small model needs to match and copy them. Characters never seen fall back to bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainer import prompts
from trainer.recipe import TokenizerRecipe

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's regular expression, to the letter: GGUF files name it `qwen2`.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LINE_ENDS = ("。\n", "：\n", "\n")


def gb2312_level1() -> list[str]:
    """The 3,755 common characters of GB 2312 level 1."""
    cells = [(row, cell) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    return [bytes(pair).decode("gb2312") for pair in cells if pair < (0xD7, 0xFA)]


def train_tokenizer(texts: Iterable[str], recipe: TokenizerRecipe, context: int) -> PreTrainedTokenizerFast:
    """Trains the tokenizer and gives it our chat template; pad is <|endoftext|>, eos is <|im_end|>, no bos."""
    counts = Counter(character for text in texts for character in text)
    if recipe.all_characters:
        counts.update(gb2312_level1())
    units = [unit for unit, count in sorted(counts.items()) for _ in range(min(count, 50))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # type: ignore[call-arg]
    tokenizer.train_from_iterator([*units, *(line for line in _LINE_ENDS for _ in range(1000))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=prompts.chat_template(),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Id of one token; raises KeyError when the vocabulary lacks it."""
    return tokenizer.get_vocab()[token]
