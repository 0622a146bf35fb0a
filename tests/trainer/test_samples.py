"""Sample answers: the same prompts every time, greedy, and a samples.md that a killed run does not spoil."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trainer import prompts as wording
from trainer.corpus.build import build_corpus
from trainer.corpus.record import Message, Record, read_records
from trainer.evaluate.samples import Prompt, append_samples, fixed_prompts, sample
from trainer.recipe import PROJECT, TokenizerRecipe, load_recipe
from trainer.tokenizer import train_tokenizer

NAMES = ["knowledge", "diagnosis", "treatment", "identity", "out_of_scope"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    recipe = load_recipe(PROJECT / "tests" / "recipes" / "tiny.yaml", ["corpus.held_out=200"])
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    build_corpus(recipe, folder)
    return list(read_records(folder / "held_out_questions.jsonl"))


@pytest.fixture(scope="module")
def tokenizer(questions: list[Record]) -> PreTrainedTokenizerFast:
    texts = [message.content for record in questions for message in record.messages or ()]
    return train_tokenizer(texts, TokenizerRecipe(vocab_size=1500), 1024)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def test_one_prompt_per_task_with_its_passages(questions: list[Record]) -> None:
    prompts = fixed_prompts(questions)
    assert [prompt.name for prompt in prompts] == NAMES
    assert prompts == fixed_prompts(questions)
    for prompt in prompts[:3]:
        assert [message.role for message in prompt.messages] == ["system", "user"]
        assert prompt.messages[1].content.startswith("资料\n[1]")
        assert prompt.messages[1].content.endswith(f"问题：{prompt.question}")
    refused = next(r for r in questions if r.messages and r.messages[:2] == prompts[4].messages)
    assert (refused.messages or ())[2].content == wording.prompts()["phrases"]["refusal"]


def test_a_corpus_without_such_questions_gets_our_own() -> None:
    prompts = fixed_prompts([])
    assert [prompt.name for prompt in prompts] == NAMES[3:]
    assert prompts[0].question == "你是谁？你是医生吗？"


def _greedy_alone(model, tokenizer: PreTrainedTokenizerFast, prompt: Prompt, count: int) -> tuple[str, bool]:
    """Without padding, cache or `generate`: the most likely token, one by one."""
    text = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in prompt.messages)
    ids = tokenizer.encode(text + "<|im_start|>assistant\n")
    answer: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
            if answer[-1] == tokenizer.eos_token_id:
                return tokenizer.decode(answer[:-1]), True
    return tokenizer.decode(answer), False


def test_answers_are_greedy_whatever_the_base_says_and_cut_ones_say_so(
    model, questions: list[Record], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert model.generation_config is not None
    model.generation_config.update(repetition_penalty=1.4, temperature=0.6, top_k=3, do_sample=True)
    # One question whose answer ends at once: the end is the most likely token after it.
    prompts = fixed_prompts(questions)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    model.train()
    random_state = torch.get_rng_state()
    answers = sample(model, tokenizer, prompts, max_new_tokens=12)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    ends = set()
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, finished = _greedy_alone(model.eval(), tokenizer, prompt, 12)
        ends.add(finished)
        visible = "".join(c for c in expected if c.isprintable() or c == "\n").strip()
        assert answer == (visible or "〔an empty answer〕" if finished else f"{visible} 〔cut after 12 tokens〕")
    assert ends == {True, False}


PROMPTS = [
    Prompt("knowledge", (Message(role="user", content=wording.user("发热\u202e怎么办<b>？", [])),)),
    Prompt("out_of_scope", (Message(role="user", content="写诗\n# 标题"),)),
]


def test_samples_read_as_markdown(tmp_path: Path) -> None:
    file = tmp_path / "samples.md"
    answer = "# 大\x1b[31m标题\n\n```\n<img src=x onerror=y>[点](http://a)\r\n结束\u200f"
    append_samples(file, "sft", 20, PROMPTS, [answer, ""])
    text = file.read_text(encoding="utf-8")
    head, _, body = text.partition("\n## SFT · step 20\n")
    assert "**knowledge**\n\n> 资料\\\n> 问题：发热怎么办&lt;b&gt;？\n" in head
    assert (
        body == "\n**knowledge** 发热怎么办&lt;b&gt;？\n\n"
        "> \\# 大[31m标题\n>\n> \\```\\\n> &lt;img src=x onerror=y&gt;[点]\\(http://a)\\\n> 结束\n"
        "\n**out of scope** 写诗 # 标题\n\n>\n"
    )


def test_a_resumed_run_writes_the_file_that_an_uninterrupted_one_writes(tmp_path: Path) -> None:
    smooth, killed = tmp_path / "smooth.md", tmp_path / "killed.md"
    steps = [("cpt", 10), ("cpt", 20), ("sft", 10), ("sft", 20)]
    for stage, step in steps:
        append_samples(smooth, stage, step, PROMPTS, [f"{stage} {step}", "好"])
    for stage, step in [*steps[:4], *steps[2:]]:  # killed after SFT's step 20, resumed from a checkpoint before 10
        append_samples(killed, stage, step, PROMPTS, [f"{stage} {step}", "好"])
    assert killed.read_text(encoding="utf-8") == smooth.read_text(encoding="utf-8")
    assert smooth.read_text(encoding="utf-8").count("\n## ") == 5
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".md"] == []
