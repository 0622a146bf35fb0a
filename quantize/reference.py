"""What Hugging Face makes of the merged model: the truth that the GGUF is held against."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantize import strings
from quantize.run_folder import Dialogue, RunFolder
from quantize.tokenizer import Vocabulary

if TYPE_CHECKING:  # imports torch
    from quantize.live import Live

_SEQUENCES = 8  # conversations, and as many calibration dialogues, whose logits are compared
_SEQUENCE_TOKENS = 384
_LOGITS = 64 << 20  # at most so many logits are kept; a large vocabulary gets fewer positions
_GREEDY = 4
_GREEDY_TOKENS = 256


@dataclass(frozen=True)
class Rendering:
    """A conversation (or its beginning) and Hugging Face's ids of it."""

    messages: list[dict[str, str]]
    answer_next: bool
    ids: list[int]


@dataclass(frozen=True)
class Reference:
    """Everything to compare. Logits lie in `folder` as logits-N.npy, one per sequence, float32."""

    folder: Path
    texts: list[str]
    text_ids: list[list[int]]
    typed_control: list[str]
    conversations: list[list[Rendering]]
    sequences: list[list[int]]
    ends: dict[int, int]
    prompts: list[list[int]]
    generated: list[list[int]]
    gaps: list[list[float]]
    limit: int
    control: list[str] = field(default_factory=list)

    @property
    def renderings(self) -> list[Rendering]:
        return [rendering for conversation in self.conversations for rendering in conversation]


def collect(
    live: Live, run: RunFolder, vocabulary: Vocabulary, folder: Path, progress: Callable[[int, int], None]
) -> Reference:
    """Runs the merged model (`live` after `fold`) over the fixed texts and the calibration dialogues.

    `ends` maps a sequence to the position of its closing eos; `gaps` are the distances between the two best
    logits at each greedily generated position, which tell a tie from a mismatch.
    """
    folder.mkdir()
    system = {task: run.prompts["system_prompt"] + text for task, text in run.prompts["task_prompts"].items()}
    dialogues = strings.conversations(system)
    texts = strings.medical_strings()
    if vocabulary.nfc:
        # llama.cpp does not normalise; whoever calls it does, so both sides get composed text.
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        dialogues = [_composed(dialogue) for dialogue in dialogues]
    conversations = [_renderings(live, dialogue) for dialogue in dialogues]
    longest = min(live.context, _SEQUENCE_TOKENS)
    fixed = [renderings[-1].ids for renderings in conversations[:_SEQUENCES]]
    given = [live.chat_ids(dialogue.messages, answer_next=False) for dialogue in run.calibration[:_SEQUENCES]]
    # In turn, so that a large vocabulary's budget leaves some of both kinds.
    whole = [ids for pair in zip_longest(given, fixed) for ids in pair if ids]
    sequences = _shortened(whole, longest, _LOGITS // len(vocabulary.tokens))
    limit = max(1, min(_GREEDY_TOKENS, live.context // 2))
    prompts = [live.chat_ids(dialogue.messages[:-1], answer_next=True) for dialogue in run.calibration]
    prompts = [prompt for prompt in prompts if len(prompt) + limit <= live.context][:_GREEDY]
    total = len(sequences) + len(prompts)
    for number, sequence in enumerate(sequences):
        np.save(folder / f"logits-{number}.npy", live.logits(sequence))
        progress(number + 1, total)
    generated, gaps = [], []
    for number, prompt in enumerate(prompts, 1):
        generated.append(live.greedy(prompt, {vocabulary.eos}, limit))
        best = np.sort(live.logits(prompt + generated[-1])[len(prompt) - 1 : -1], axis=-1)[:, -2:]
        gaps.append([float(high - low) for low, high in best])
        progress(len(sequences) + number, total)
    control = list(vocabulary.control)
    return Reference(
        folder=folder,
        texts=texts,
        text_ids=[live.text_ids(text) for text in texts],
        typed_control=strings.typed_control(control),
        conversations=conversations,
        sequences=sequences,
        ends={
            number: len(ids) - 1 - ids[::-1].index(vocabulary.eos)
            for number, ids in enumerate(sequences)
            if ids == whole[number] and vocabulary.eos in ids
        },
        prompts=prompts,
        generated=generated,
        gaps=gaps,
        limit=limit,
        control=control,
    )


def logits_bytes(vocabulary: int) -> int:
    """Upper bound of what the compared logits of Hugging Face, the float32 file and one more file take on disk."""
    return 3 * 4 * min(_LOGITS, 2 * _SEQUENCES * _SEQUENCE_TOKENS * vocabulary)


def _shortened(sequences: list[list[int]], longest: int, budget: int) -> list[list[int]]:
    """Each at most `longest`, all together at most `budget` tokens (but one sequence at least)."""
    kept: list[list[int]] = []
    for ids in sequences:
        room = min(longest, budget - sum(map(len, kept)))
        if room < 2 and kept:
            break
        kept.append(ids[: max(room, 2)])
    return kept


def _renderings(live: Live, dialogue: Dialogue) -> list[Rendering]:
    """The conversation as it grows: before and after each answer."""
    result = []
    for number, message in enumerate(dialogue.messages):
        if message["role"] != "assistant":
            continue
        for stop, answer_next in ((number, True), (number + 1, False)):
            messages = dialogue.messages[:stop]
            result.append(Rendering(messages, answer_next, live.chat_ids(messages, answer_next=answer_next)))
    return result


def _composed(dialogue: Dialogue) -> Dialogue:
    messages = [{**m, "content": unicodedata.normalize("NFC", m["content"])} for m in dialogue.messages]
    return Dialogue(dialogue.task, messages)
