"""A checkpoint as Hugging Face runs it, in float32: the truth that exported files are held against."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import trainer.mue  # noqa: F401  (registers the adapter type with PEFT)
from quantize.errors import BadInput
from quantize.run_folder import Dialogue
from quantize.writer import Merge

# A template without this tag, which `add_generation_prompt` is not, cannot say what the assistant wrote.
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Below this many parameters one thread is faster: the threads would mostly wait for each other.
SMALL = 16_000_000


@dataclass(frozen=True)
class Tokenised:
    """Token ids of a dialogue and which of them the assistant wrote (its end token included)."""

    ids: list[int]
    assistant: list[bool]
    task: str = ""


@contextlib.contextmanager
def suitable_threads(parameters: int) -> Iterator[None]:
    """Runs a small model on one thread, and restores torch's setting afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if parameters < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class HuggingFace:
    """Model and tokenizer of a checkpoint folder, with a MUE adapter on top or without one."""

    def __init__(self, checkpoint: Path, adapter: Path | None = None) -> None:
        """Raises BadInput for what transformers or PEFT cannot load, and for weights that are not finite."""
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that only a hub could give
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
            base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
        except Exception as error:  # the tokenizers' library raises nothing more specific
            raise BadInput(
                f"transformers cannot load {checkpoint} ({_first_line(error)}); export it with --check file, "
                "which does without."
            ) from error
        for name, parameter in base.named_parameters():
            if not torch.isfinite(parameter).all():
                raise BadInput(f"{checkpoint}: {name} holds values that are not finite; the training diverged.")
        try:
            self.model: Any = (base if adapter is None else PeftModel.from_pretrained(base, adapter)).eval()
        except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
            raise BadInput(
                f"PEFT cannot load {adapter} ({_first_line(error)}); copy the adapter again, or train it again."
            ) from error
        self.adapted = adapter is not None
        self.context: int = base.config.max_position_embeddings

    def chat_ids(self, messages: list[dict[str, str]], *, answer_next: bool) -> list[int]:
        """Hugging Face's own rendering and tokenising of a conversation."""
        encoded = self.tokenizer.apply_chat_template(messages, return_dict=True, add_generation_prompt=answer_next)
        return list(encoded["input_ids"])

    def text_ids(self, text: str) -> list[int]:
        """Hugging Face's token ids of plain text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokenise(self, dialogues: list[Dialogue]) -> list[Tokenised]:
        """Dialogues with the assistant's tokens marked. Raises BadInput when none has an answer in the context."""
        result = []
        for dialogue in dialogues:
            ids, marks = self._marked(dialogue.messages)
            if any(marks[: self.context]):
                result.append(Tokenised(ids[: self.context], marks[: self.context], dialogue.task))
        if not result:
            raise BadInput(
                "No dialogue has an answer that fits the model's context, or the chat template marks no answer; "
                "give other dialogues with --calibration, or train the run again with the template in trainer/prompts/."
            )
        return result

    @torch.inference_mode()
    def fold(self, merge: Merge) -> None:
        """Adds what the merge says to the weights of the base, in place."""
        prefix = "base_model.model." if self.adapted else ""
        for name, module in self.model.named_modules():
            bare = name.removeprefix(prefix).removesuffix(".base_layer")
            if isinstance(module, torch.nn.Linear) and (delta := merge.delta_rows(bare, slice(None))) is not None:
                module.weight.add_(torch.from_numpy(delta))

    @torch.inference_mode()
    def logits(self, sequence: list[int]) -> np.ndarray:
        """Logits [tokens, vocabulary] of the model without live experts."""
        with self.without_adapter():
            return self.model(input_ids=torch.tensor([sequence])).logits[0].float().numpy()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], ends: set[int], limit: int) -> list[int]:
        """Greedy continuation up to and including the first id in `ends`, at most `limit` tokens."""
        with self.without_adapter():
            ids = torch.tensor([prompt])
            generated = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=limit,
                eos_token_id=sorted(ends),
                pad_token_id=min(ends),
            )
        return generated[0, len(prompt) :].tolist()

    def without_adapter(self) -> contextlib.AbstractContextManager[Any]:
        """The base model alone, for the duration of a `with`."""
        return self.model.disable_adapter() if self.adapted else contextlib.nullcontext()

    def _marked(self, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
        if _MARKS.search(self.tokenizer.chat_template or ""):
            encoded = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
        # A template that cannot mark: the last answer is what comes after the prompt that asks for it.
        prompt = self.chat_ids(messages[:-1], answer_next=True)
        whole = self.chat_ids(messages, answer_next=False)
        if whole[: len(prompt)] != prompt:
            return whole, [False] * len(whole)
        return whole, [False] * len(prompt) + [True] * (len(whole) - len(prompt))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
