"""The live MUE model in float32: its gates, what merging costs, and the reference outputs."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
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
from quantize.experts import Merge
from quantize.run_folder import Dialogue

# Below this many parameters one thread is faster: the threads would mostly wait for each other.
SMALL = 16_000_000
_PREFIX = "base_model.model."
_NAME = "default"


@dataclass(frozen=True)
class Tokenised:
    """Token ids of a dialogue and which of them the assistant wrote (its end token included)."""

    ids: list[int]
    assistant: list[bool]


@contextlib.contextmanager
def suitable_threads(parameters: int) -> Iterator[None]:
    """Runs a small model on one thread, and restores torch's setting afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if parameters < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Live:
    """Base model with its adapter; `fold` turns the base into the merged model."""

    def __init__(self, checkpoint: Path, adapter: Path) -> None:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
        self.model: Any = PeftModel.from_pretrained(base, adapter).eval()
        self.context: int = base.config.max_position_embeddings
        self._layers: dict[str, Any] = {
            name.removeprefix(_PREFIX): module
            for name, module in self.model.named_modules()
            if hasattr(module, "mue_A")
        }

    def chat_ids(self, messages: list[dict[str, str]], *, answer_next: bool) -> list[int]:
        """Hugging Face's own rendering and tokenising of a conversation."""
        encoded = self.tokenizer.apply_chat_template(messages, return_dict=True, add_generation_prompt=answer_next)
        return list(encoded["input_ids"])

    def text_ids(self, text: str) -> list[int]:
        """Hugging Face's token ids of plain text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokenise(self, dialogues: list[Dialogue]) -> list[Tokenised]:
        """Dialogues with the assistant's tokens marked. Raises BadInput when the template marks none."""
        result = []
        for dialogue in dialogues:
            encoded = self.tokenizer.apply_chat_template(
                dialogue.messages, return_dict=True, return_assistant_tokens_mask=True
            )
            ids = list(encoded["input_ids"])[: self.context]
            marks = [bool(mark) for mark in encoded["assistant_masks"]][: self.context]
            if any(marks):
                result.append(Tokenised(ids, marks))
        if not result:
            raise BadInput(
                "The chat template marks no assistant tokens ({% generation %}), or calibration.jsonl has no answer "
                "that fits the context; train the run again with the template in trainer/prompts/."
            )
        return result

    @torch.inference_mode()
    def measure(self, dialogues: list[Tokenised], progress: Callable[[], None]) -> tuple[dict[str, np.ndarray], float]:
        """Mean gates [N] of every layer over all tokens, and the live model's loss (nats per assistant token)."""
        sums = {
            name: torch.zeros(layer.num_specific[_NAME], dtype=torch.float64) for name, layer in self._layers.items()
        }

        def watch(name: str) -> Callable[..., None]:
            def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
                sums[name] += layer.gates(inputs[0], _NAME).double().flatten(0, -2).sum(0)

            return hook

        handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in self._layers.items()]
        try:
            loss = self._loss(dialogues, progress)
        finally:
            for handle in handles:
                handle.remove()
        tokens = sum(len(dialogue.ids) for dialogue in dialogues)
        return {name: (total / tokens).numpy() for name, total in sums.items()}, loss

    @torch.inference_mode()
    def base_loss(self, dialogues: list[Tokenised], progress: Callable[[], None]) -> float:
        """Loss without the experts: of the base model, or after `fold` of the merged one."""
        with self.model.disable_adapter():
            return self._loss(dialogues, progress)

    @torch.inference_mode()
    def fold(self, merge: Merge) -> None:
        """Adds the merged experts to the base weights, in place."""
        for name, layer in self._layers.items():
            weight = layer.get_base_layer().weight
            delta = merge.delta_rows(name, 0, weight.shape[0])
            if delta is None:
                raise BadInput(f"The adapter file holds nothing for {name}; train the run's stage mue again.")
            weight.add_(torch.from_numpy(delta))

    @torch.inference_mode()
    def logits(self, sequence: list[int]) -> np.ndarray:
        """Logits [tokens, vocabulary] of the model without live experts."""
        with self.model.disable_adapter():
            return self.model(input_ids=torch.tensor([sequence])).logits[0].float().numpy()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], ends: set[int], limit: int) -> list[int]:
        """Greedy continuation up to and including the first id in `ends`, at most `limit` tokens."""
        with self.model.disable_adapter():
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

    def _loss(self, dialogues: list[Tokenised], progress: Callable[[], None]) -> float:
        total, count = 0.0, 0
        for dialogue in dialogues:
            ids = torch.tensor([dialogue.ids])
            wanted = torch.tensor(dialogue.assistant)[1:]
            logits = self.model(input_ids=ids).logits[0, :-1][wanted]
            total += torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:][wanted], reduction="sum").item()
            count += int(wanted.sum())
            progress()
        return total / count
