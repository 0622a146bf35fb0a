"""What the model says while it learns: the same few questions at every evaluation, side by side in samples.md."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from trainer import prompts as wording
from trainer.corpus.record import Message, Record
from trainer.evaluate.likelihood import undisturbed

_CUT, _EMPTY = "〔cut after {count} tokens〕", "〔an empty answer〕"
# Asked without passages when the corpus has no such question.
_OWN = {"identity": "你是谁？你是医生吗？", "out_of_scope": "请帮我写一份去海边旅游三天的行程。"}
_HEADER = """# Samples

The same questions at every evaluation, answered greedily. Machine text for judging a training; never advice.
"""


@dataclass(frozen=True)
class Prompt:
    """A fixed question: what it tests and the messages up to the answer."""

    name: str
    messages: tuple[Message, ...]

    @property
    def question(self) -> str:
        """The question alone, without the passages (all of the last message if it is not written in our template)."""
        before = wording.prompts()["question_template"].partition("${passages}")[2].partition("$question")[0]
        return self.messages[-1].content.rpartition(before)[2].strip()


def fixed_prompts(questions: Sequence[Record]) -> list[Prompt]:
    """One prompt per consultation task, with its passages, one about the model itself and one out of scope.

    Each is the first turn of the first such record; identity and out of scope are our own if there is none.
    """
    refusal = wording.prompts()["phrases"]["refusal"]
    found: dict[str, Prompt] = {}
    for record in questions:
        messages = record.messages or ()
        turn = next((index for index, message in enumerate(messages) if message.role == "assistant"), 0)
        refused = record.task == "safety" and messages[turn].content == refusal
        name = "out_of_scope" if refused else record.task
        if turn and name not in found:
            found[name] = Prompt(name, messages[:turn])
    system = Message(role="system", content=wording.system("knowledge"))
    for name, question in _OWN.items():
        found.setdefault(name, Prompt(name, (system, Message(role="user", content=wording.user(question, [])))))
    return [found[name] for name in (*wording.prompts()["task_prompts"], *_OWN) if name in found]


def sample(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], max_new_tokens: int = 160
) -> list[str]:
    """Greedy answers, in order; one that did not come to its end within `max_new_tokens` ends with a cut mark.

    Training is not disturbed: modes and random states are restored.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    rendered: list[list[int]] = [
        tokenizer.apply_chat_template(
            [message.model_dump() for message in prompt.messages], add_generation_prompt=True, return_dict=True
        )["input_ids"]  # type: ignore[index, misc]
        for prompt in prompts
    ]
    end, longest = tokenizer.eos_token_id, max(map(len, rendered))
    pad: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end  # type: ignore[assignment]
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rendered])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rendered])
    device = next(model.parameters()).device
    with undisturbed(model), torch.no_grad():
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=_greedy(end, pad, max_new_tokens),
        )
    return [_answer(tokenizer, row[longest:].tolist(), max_new_tokens) for row in output.cpu()]


def _greedy(end: Any, pad: int, max_new_tokens: int) -> GenerationConfig:
    """All that a base's own generation config might set otherwise (Qwen2.5 has a repetition penalty) is said."""
    return GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0, top_k=50, use_cache=True,
        max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip


def _answer(tokenizer: PreTrainedTokenizerFast, ids: list[int], max_new_tokens: int) -> str:
    end = tokenizer.eos_token_id
    finished = end in ids
    ids = ids[: ids.index(end)] if finished else ids
    text = _clean(str(tokenizer.decode(ids))).strip()
    return (text or _EMPTY) if finished else f"{text} {_CUT.format(count=max_new_tokens)}".strip()


def append_samples(file: Path, stage: str, step: int, prompts: Sequence[Prompt], answers: Sequence[str]) -> None:
    """Adds the answers of one evaluation to samples.md, which is written aside and renamed.

    A section of this stage and step that is already there, and all after it, is replaced: it was written by a process
    that was killed before its next checkpoint, and the resumed training comes past here again.
    """
    heading = f"\n## {stage.upper()} · step {step}\n"
    text = file.read_text(encoding="utf-8") if file.exists() else _HEADER + _questions(prompts)
    text = text.partition(heading)[0] + heading
    for prompt, answer in zip(prompts, answers, strict=True):
        text += f"\n**{_name(prompt)}** {_inline(prompt.question)}\n\n{_quote(answer)}\n"
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _questions(prompts: Sequence[Prompt]) -> str:
    """Once, at the top: every prompt as the model sees it."""
    text = "\n## Prompts\n"
    for prompt in prompts:
        text += f"\n**{_name(prompt)}**\n\n{_quote(prompt.messages[-1].content)}\n"
    return text


def _name(prompt: Prompt) -> str:
    return prompt.name.replace("_", " ")


def _quote(text: str) -> str:
    """A Markdown block quote that keeps the lines."""
    lines = [_inline(line) for line in _clean(text).strip().split("\n")]
    broken = [
        f"{line}\\" if line and following else line for line, following in zip(lines, [*lines[1:], ""], strict=True)
    ]
    return "\n".join(f"> {line}".rstrip() for line in broken)


def _inline(text: str) -> str:
    """One line as Markdown text: no HTML, no heading or fence at its start, no link or picture in it."""
    text = html.escape(_clean(text).replace("\n", " ").strip(), quote=False).replace("](", "]\\(")
    return re.sub(r"^(?=[#>+\-*=|`~])", r"\\", text)


def _clean(text: str) -> str:
    """Without control and format characters, which a terminal or a browser might obey; line ends stay."""
    text = re.sub(r"\r\n?|[\u2028\u2029]", "\n", text).replace("\t", " ")
    return "".join(char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co"))
