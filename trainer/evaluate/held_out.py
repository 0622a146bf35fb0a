"""What training does to a model, measured on what it never trains on.

General Chinese (general.txt: what may be forgotten), pediatric text (what CPT is for), answers of dialogues (SFT and
PSFT) and preference pairs (DFPO). All losses are sums of nats over tokens, divided at the end, so ranks can be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from trainer.corpus.record import Message, Record, read_records
from trainer.evaluate.likelihood import HeldOutError, Scored, nats_of, undisturbed

GENERAL_FILE = Path(__file__).parent / "general.txt"
_TOKENS_PER_BATCH = 8192  # padding included


@dataclass(frozen=True)
class HeldOut:
    """The held-out records of a corpus; what it does not have is empty and gives no figures."""

    general: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    questions: tuple[Record, ...] = ()
    new_cards: tuple[Record, ...] = ()
    preferences: tuple[Record, ...] = ()


@dataclass(frozen=True)
class _Example:
    """What is scored together: one sequence, or the chosen and the rejected one of a preference."""

    figures: tuple[str, ...]
    sequences: tuple[Scored, ...]
    characters: int = 0


def load_held_out(corpus: Path) -> HeldOut:
    """The held-out files of a corpus folder and the general passages. Raises CorpusError for a bad record."""

    def records(name: str) -> tuple[Record, ...]:
        path = corpus / f"{name}.jsonl"
        return tuple(read_records(path)) if path.exists() else ()

    return HeldOut(
        general=tuple(GENERAL_FILE.read_text(encoding="utf-8").splitlines()),
        texts=tuple(record.text or "" for record in records("held_out_texts")),
        questions=records("held_out_questions"),
        new_cards=records("held_out_cards"),
        preferences=records("held_out_preferences"),
    )


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    held_out: HeldOut,
    max_length: int,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
    *,
    bf16: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """`figures` of all held-out records. With `world` > 1 every rank calls it and every rank gets the whole result."""
    total = sums(model, tokenizer, held_out, max_length, device, rank, world, bf16=bf16, progress=progress)
    if world > 1:
        values = torch.tensor(list(total.values()), dtype=torch.float64, device=_device(model, device))
        torch.distributed.all_reduce(values)
        total = dict(zip(total, values.tolist(), strict=True))
    return figures(total)


def figures(sums: dict[str, float]) -> dict[str, float]:
    """Figures of (added) `sums`; what was not measured is left out.

    - ``general_perplexity``, ``domain_perplexity``: per token of this tokenizer.
    - ``general_bits_per_character``, ``domain_bits_per_character``: comparable between tokenizers.
    - ``assistant_loss``, ``assistant_loss/TASK``, ``assistant_loss/new_cards``: nats per token of the answers.
    - ``preference_accuracy``: share of pairs whose chosen answer has the higher mean log-probability per token
      (reference-free: the model itself, not its ratio to another, as when it is asked to rank two answers).
    - ``preference_margin``: mean over pairs of that difference, in nats per token.
    - ``preference_log_odds``: mean over pairs of log P(chosen) − log P(rejected) of the whole answers, in nats: how
      much likelier the model is to write the chosen one. Long answers of easy phrases have a high mean but a low sum,
      so this still moves when the accuracy per token is at 100 % from the start.
    """
    values: dict[str, float] = {}
    for name in ("general", "domain"):
        if sums.get(f"{name} tokens"):
            nats = sums[f"{name} nats"]
            values[f"{name}_perplexity"] = math.exp(min(nats / sums[f"{name} tokens"], 700.0))
            values[f"{name}_bits_per_character"] = nats / math.log(2) / max(1.0, sums[f"{name} characters"])
    for key, tokens in sums.items():
        name = key.removesuffix(" tokens")
        if name != key and name.startswith("assistant_loss") and tokens:
            values[name] = sums[f"{name} nats"] / tokens
    if pairs := sums.get("preference pairs"):
        values["preference_accuracy"] = sums["preference won"] / pairs
        values["preference_margin"] = sums["preference margin"] / pairs
        values["preference_log_odds"] = sums["preference log odds"] / pairs
    return values


def sums(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    held_out: HeldOut,
    max_length: int,
    device: torch.device | str | None = None,
    rank: int = 0,
    world: int = 1,
    *,
    bf16: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """This rank's share of the sums; all ranks have the same keys and call the model equally often (FSDP needs that).

    Sequences longer than `max_length` are cut at their end. Training is not disturbed: modes and random states are
    restored. `progress` gets (batches done, batches). Raises HeldOutError when no answer has a token to score.
    """
    examples = _examples(tokenizer, held_out, max_length)
    batches = _batches(examples)
    total = dict.fromkeys(sorted({key for example in examples for key in _parts(example, [0.0, 0.0])}), 0.0)
    rounds = -(-len(batches) // world)
    place = _device(model, device)
    with undisturbed(model), torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=bf16):
        for done in range(rounds):
            index = done * world + rank
            batch = batches[min(index, len(batches) - 1)]
            nats = iter(nats_of(model, [sequence for example in batch for sequence in example.sequences], place))
            if index < len(batches):
                for example in batch:
                    for key, value in _parts(example, [next(nats) for _ in example.sequences]).items():
                        total[key] += value
            if progress:
                progress(done + 1, rounds)
    return total


def _device(model: Any, device: torch.device | str | None) -> torch.device:
    return torch.device(device) if device else next(model.parameters()).device


def _parts(example: _Example, nats: Sequence[float]) -> dict[str, float]:
    """What one example adds to the sums; `nats` of each of its sequences."""
    counts = [len(sequence.positions) for sequence in example.sequences]
    if len(counts) == 2:
        margin = nats[1] / counts[1] - nats[0] / counts[0]
        return {
            "preference pairs": 1.0,
            "preference won": float(margin > 0),
            "preference margin": margin,
            "preference log odds": nats[1] - nats[0],
        }
    parts = {}
    for name in example.figures:
        parts |= {f"{name} nats": nats[0], f"{name} tokens": float(counts[0])}
        if example.characters:
            parts[f"{name} characters"] = float(example.characters)
    return parts


def _examples(tokenizer: PreTrainedTokenizerFast, held_out: HeldOut, max_length: int) -> list[_Example]:
    examples = []
    for name, texts in (("general", held_out.general), ("domain", held_out.texts)):
        examples += [_text(tokenizer, name, text, max_length) for text in texts]
    dialogues = [(record, ("assistant_loss", f"assistant_loss/{record.task}")) for record in held_out.questions]
    dialogues += [(record, ("assistant_loss/new_cards",)) for record in held_out.new_cards]
    answers = [_answers(tokenizer, record.messages or (), 0, max_length) for record, _ in dialogues]
    if answers and not any(answer.positions for answer in answers):
        raise HeldOutError(
            f"None of the {len(answers)} held-out dialogues has an answer's token among its first {max_length}. "
            "Raise max_length, or give the tokenizer a chat template that marks answers with {% generation %}."
        )
    examples += [_Example(names, (answer,)) for (_, names), answer in zip(dialogues, answers, strict=True)]
    examples += [_pair(tokenizer, record, max_length) for record in held_out.preferences]
    return [example for example in examples if all(sequence.positions for sequence in example.sequences)]


def _text(tokenizer: PreTrainedTokenizerFast, name: str, text: str, max_length: int) -> _Example:
    """The first token has nothing before it: neither it nor its characters count."""
    ids: list[int] = tokenizer(text)["input_ids"][:max_length]  # type: ignore[index, assignment]
    characters = len(tokenizer.decode(ids[1:], skip_special_tokens=True))
    return _Example((name,), (Scored(ids, list(range(1, len(ids)))),), characters)


def _pair(tokenizer: PreTrainedTokenizerFast, record: Record, max_length: int) -> _Example:
    prompt, chosen, rejected = record.prompt or (), record.chosen or (), record.rejected or ()
    plain = [message.model_dump() for message in prompt]
    start = len(tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"])  # type: ignore[index, arg-type]
    answers = (_answers(tokenizer, (*prompt, *answer), start, max_length) for answer in (chosen, rejected))
    return _Example((), tuple(answers))


def _answers(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], start: int, max_length: int) -> Scored:
    """A dialogue of which the assistant's tokens from position `start` on are scored, as in SFT."""
    plain = [message.model_dump() for message in messages]
    rendered: Any = tokenizer.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    marks = rendered["assistant_masks"][:max_length]
    positions = [position for position, mark in enumerate(marks) if mark and position >= max(start, 1)]
    return Scored(rendered["input_ids"][:max_length], positions)


def _batches(examples: Sequence[_Example]) -> list[list[_Example]]:
    """Examples of like length, the longest first: memory that does not suffice is found at once."""

    def length(example: _Example) -> int:
        return max(len(sequence.ids) for sequence in example.sequences)

    batches: list[list[_Example]] = []
    rows = longest = 0
    for example in sorted(examples, key=length, reverse=True):
        if not batches or (rows + len(example.sequences)) * longest > _TOKENS_PER_BATCH:
            batches.append([])
            rows, longest = 0, length(example)
        batches[-1].append(example)
        rows += len(example.sequences)
    return batches
