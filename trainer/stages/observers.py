"""What is looked at when a stage is evaluated: answers to fixed questions, and where the routers send the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.corpus.record import Record
from trainer.evaluate.likelihood import undisturbed
from trainer.evaluate.samples import append_samples, fixed_prompts, sample
from trainer.mue.observe import gate_heat_map, observe
from trainer.stages.watch import append_row

_DIALOGUES_PER_TASK = 8


class Observer:
    """Writes samples.md, and for MUE the router's figures and heat map, into a run folder."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Record], bf16: bool = False
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.questions = questions
        self.bf16 = bf16
        self._prompts = fixed_prompts(questions)

    def look(self, model: Any, stage: str, step: int) -> None:
        """One look at a model that this process holds whole; training is not disturbed."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            answers = sample(model, self.tokenizer, self._prompts)
            append_samples(self.folder / "samples.md", stage, step, self._prompts, answers)
            if stage == "mue":
                self._look_at_router(model, step, device)

    def _look_at_router(self, model: Any, step: int, device: torch.device) -> None:
        with undisturbed(model), torch.no_grad(), observe(model) as statistics:
            for task in dict.fromkeys(record.task for record in self.questions):
                statistics.task = task
                records = [record for record in self.questions if record.task == task]
                for record in records[:_DIALOGUES_PER_TASK]:
                    messages = [message.model_dump() for message in record.messages or ()]
                    encoded: Any = self.tokenizer.apply_chat_template(messages, return_dict=True)
                    model(input_ids=torch.tensor([encoded["input_ids"]], device=device), logits_to_keep=1)
        entropy = statistics.entropy()
        layers = {
            name: {"usage": [round(gate, 4) for gate in gates.tolist()], "entropy": round(entropy[name], 4)}
            for name, gates in statistics.usage().items()
        }
        row = {"stage": "mue", "step": step, **statistics.figures(), "router/layers": layers}
        append_row(self.folder / "metrics.jsonl", row)
        gate_heat_map(statistics, self.folder / "plots" / "router.png")


class LookAtEvaluation(TrainerCallback):
    """Looks whenever the stage is evaluated, but for its end: Run looks then, at what the stage hands on."""

    def __init__(self, observer: Observer, stage: str) -> None:
        self.observer = observer
        self.stage = stage

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self.observer.look(model, self.stage, state.global_step)
