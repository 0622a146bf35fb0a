"""What every file is held against: fixed texts and dialogues, their token ids, and what Hugging Face makes of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from quantize import chat, probe, strings, vocabulary
from quantize.comparison import Track
from quantize.own_words import OwnWords
from quantize.run_folder import Dialogue, read_dialogues
from quantize.source import Source
from quantize.vocabulary import Vocabulary

if TYPE_CHECKING:  # imports torch
    from quantize.hugging_face import HuggingFace

# quick: vocabulary and template; file: also weights and logits against the unquantized file; full: also that file
# against Hugging Face.
Level = Literal["quick", "file", "full"]
# (messages, whether an answer is asked for next)
Turn = tuple[list[dict[str, str]], bool]

HELD_OUT = Path(__file__).parent / "texts" / "held_out.jsonl"
_SEQUENCES = 8  # conversations, and as many calibration dialogues, compared with Hugging Face besides the held-out ones
_SEQUENCE_TOKENS = 384
_LOGITS = 64 << 20  # at most so many logits of one model are kept; a large vocabulary gets fewer positions
_GREEDY = 4
_GREEDY_TOKENS = 256
# Parameters times tokens: about a minute of a laptop's processor for the texts, and for each greedy answer.
_TEXT_WORK, _GREEDY_WORK = 2e12, 3e10
_TEXT_TOKENS = (512, 8192)  # at least, at most


@dataclass(frozen=True)
class Rendering:
    """A conversation (or its beginning) and its ids."""

    messages: list[dict[str, str]]
    answer_next: bool
    ids: list[int]


@dataclass(frozen=True)
class Reference:
    """Everything to compare.

    text_ids: of `texts`, None when nobody but the file knows them. measured: how many of `sequences`, the first, are
    held-out text. ends: of a sequence the position of its closing eos. questions: how the `prompts` read.
    track, generated, answers, gaps: Hugging Face's logits, greedy answers as ids and as text, and the gap of the two
    best logits at each of their tokens, which tells a tie from a mismatch; None below level `full`.
    """

    level: Level
    texts: list[str]
    text_ids: list[list[int]] | None
    typed_control: list[str]
    conversations: list[list[Rendering]]
    control: list[str]
    sequences: list[list[int]] = field(default_factory=list)
    measured: int = 0
    ends: dict[int, int] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    limit: int = 1
    track: Track | None = None
    generated: list[list[int]] | None = None
    answers: list[str] | None = None
    gaps: list[list[float]] | None = None

    @property
    def renderings(self) -> list[Rendering]:
        return [rendering for conversation in self.conversations for rendering in conversation]


def collect(
    live: HuggingFace,
    source: Source,
    words: Vocabulary,
    folder: Path,
    progress: Callable[[int, int], None],
    *,
    parameters: int = 0,
) -> Reference:
    """Level `full`: runs the (merged) model over the texts. At most 256 MiB of logits are kept in `folder`.

    `parameters` bounds the time: a large model gets fewer and shorter texts.
    """
    folder.mkdir()
    if not live.tokenizer.chat_template:  # the vocabulary then has one that came with this program
        live.tokenizer.chat_template = words.chat_template
    ids = _Ids(
        lambda texts: [live.text_ids(text) for text in texts],
        lambda turns: [live.chat_ids(messages, answer_next=answer) for messages, answer in turns],
    )
    plan = _plan(ids, source, words, live.context, "full", parameters)
    track = Track(plan.sequences, folder, kept_positions(len(words.tokens)))
    total = len(plan.sequences) + len(plan.prompts)
    for number, sequence in enumerate(plan.sequences):
        track.add(number, 0, live.logits(sequence))
        progress(number + 1, total)
    generated, gaps = [], []
    for number, prompt in enumerate(plan.prompts, 1):
        generated.append(live.greedy(prompt, {words.eos}, plan.limit))
        best = np.sort(live.logits(prompt + generated[-1])[len(prompt) - 1 : -1], axis=-1)[:, -2:]
        gaps.append([float(high - low) for low, high in best])
        progress(len(plan.sequences) + number, total)
    return replace(
        plan,
        track=track,
        generated=generated,
        answers=[live.tokenizer.decode(answer, skip_special_tokens=True) for answer in generated],
        gaps=gaps,
    )


def collect_plain(source: Source, words: Vocabulary, context: int, level: Level, *, parameters: int = 0) -> Reference:
    """Levels `quick` and `file`: the ids by the checkpoint's own tokenizer library; neither torch nor transformers."""

    def chat_ids(turns: list[Turn]) -> list[list[int]]:
        parts = [
            chat.segments(words.chat_template, messages, list(words.control), answer_next=answer)
            for messages, answer in turns
        ]
        plain = sorted({text for segments in parts for kind, text in segments if kind == "plain"})
        known = dict(zip(plain, vocabulary.reference_ids(source.checkpoint, plain), strict=True))
        return [
            [i for kind, text in segments for i in ([words.control[text]] if kind == "control" else known[text])]
            for segments in parts
        ]

    ids = _Ids(lambda texts: vocabulary.reference_ids(source.checkpoint, texts), chat_ids)
    return _plan(ids, source, words, context, level, parameters)


def collect_own(
    file: Path, words: Vocabulary | OwnWords, context: int, level: Level, folder: Path, *, parameters: int = 0
) -> Reference:
    """For a GGUF nobody has the source of: its own ids, as llama.cpp gives them.

    What is left to check is whether they hold together. Raises child.ChildFailed, chat.TemplateFailed.
    """
    folder.mkdir()

    def chat_ids(turns: list[Turn]) -> list[list[int]]:
        control = list(words.control)
        parts = [chat.segments(words.chat_template, m, control, answer_next=answer) for m, answer in turns]
        return probe.probe(file, probe.Request(segments=parts), folder, lambda _done, _total: None).segments

    ids = _Ids(lambda _texts: [], chat_ids)
    return replace(_plan(ids, Source(file.name, file), words, context, level, parameters), text_ids=None)


def kept_positions(vocabulary_size: int) -> int:
    """Of how many positions the logits are kept to compare others with."""
    return max(64, _LOGITS // vocabulary_size)


def logits_bytes(vocabulary_size: int) -> int:
    """Upper bound of what the kept logits of two models and the blocks under way take on disk."""
    return 4 * vocabulary_size * (2 * min(kept_positions(vocabulary_size), 1 << 15) + 256)


def token_budget(parameters: int, vocabulary_size: int) -> int:
    """How many tokens of held-out text a model of this size is run over; also the logits take their time."""
    least, most = _TEXT_TOKENS
    return int(min(most, max(least, min(_TEXT_WORK / max(1, parameters), 4 * _LOGITS / vocabulary_size))))


def answer_tokens(parameters: int, context: int) -> int:
    """How long a greedy answer may become."""
    return max(1, min(_GREEDY_TOKENS, context // 2, max(32, int(_GREEDY_WORK / max(1, parameters)))))


def held_out() -> list[Dialogue]:
    """Forty short conversations as parents and doctors have them, written for this purpose."""
    return read_dialogues(HELD_OUT)


@dataclass(frozen=True)
class _Ids:
    """Token ids of plain texts, and of conversations."""

    texts: Callable[[list[str]], list[list[int]]]
    turns: Callable[[list[Turn]], list[list[int]]]


def _plan(
    ids: _Ids, source: Source, words: Vocabulary | OwnWords, context: int, level: Level, parameters: int
) -> Reference:
    """Everything but what Hugging Face makes of it."""
    given = source.prompts or {"system_prompt": "", "task_prompts": {}}
    system = {task: given["system_prompt"] + text for task, text in given["task_prompts"].items()}
    # llama.cpp does not normalise; whoever calls it does, so both sides get composed text.
    form = (lambda text: unicodedata.normalize("NFC", text)) if words.nfc else (lambda text: text)
    texts = words.exact([form(text) for text in strings.medical_strings()])
    control = list(words.control)
    fixed = [_formed(dialogue, form) for dialogue in strings.conversations(system)]
    grown = [_turns(d) for d in fixed if len(words.exact([m["content"] for m in d.messages])) == len(d.messages)]
    unseen, calibration, asked = [], [], []
    if level != "quick":
        unseen = [_formed(d, form) for pair in zip_longest(source.held_out, held_out()) for d in pair if d]
        calibration = [_formed(d, form) for d in source.calibration]
        asked = [d for d in (unseen if source.held_out else calibration or unseen) if len(d.messages) > 1][
            : 4 * _GREEDY
        ]
    # All in one call: each may cost a process.
    found = iter(
        ids.turns(
            [
                *chain.from_iterable(grown),
                *((d.messages, False) for d in [*unseen, *calibration[:_SEQUENCES]]),
                *((d.messages[:-1], True) for d in asked),
            ]
        )
    )
    conversations = [[Rendering(messages, answer, next(found)) for messages, answer in turns] for turns in grown]
    reference = Reference(level, texts, ids.texts(texts), strings.typed_control(control), conversations, control)
    if level == "quick":
        return reference
    held, known = [next(found) for _ in unseen], [next(found) for _ in calibration[:_SEQUENCES]]
    longest, budget = min(context, _SEQUENCE_TOKENS), token_budget(parameters, len(words.tokens))
    whole = _shortened(held, longest, budget)
    sequences, measured = list(whole), len(whole)
    whole = held[:measured]
    if level == "full":
        ends = [turns[-1].ids for turns in conversations[:_SEQUENCES]]
        more = [one for pair in zip_longest(known, ends) for one in pair if one]
        whole = whole + more
        sequences += _shortened(more, longest, max(_TEXT_TOKENS[0], budget - sum(map(len, sequences))))
    limit = answer_tokens(parameters, context)
    prompts = list(found)
    fitting = [n for n, prompt in enumerate(prompts) if len(prompt) + limit <= context][:_GREEDY]
    return replace(
        reference,
        sequences=sequences,
        measured=measured,
        ends={
            number: len(one) - 1 - one[::-1].index(words.eos)
            for number, one in enumerate(sequences)
            if one == whole[number] and words.eos in one
        },
        prompts=[prompts[n] for n in fitting],
        questions=[asked[n].messages[-2]["content"] for n in fitting],
        limit=limit,
    )


def _shortened(sequences: list[list[int]], longest: int, budget: int) -> list[list[int]]:
    """Each at most `longest`, all together at most `budget` tokens (but one sequence at least)."""
    kept: list[list[int]] = []
    for ids in sequences:
        room = min(longest, budget - sum(map(len, kept)))
        if room < 2 and kept:
            break
        kept.append(ids[: max(room, 2)])
    return kept


def _turns(dialogue: Dialogue) -> list[Turn]:
    """A conversation as it grows: before and after each answer."""
    turns: list[Turn] = []
    for number, message in enumerate(dialogue.messages):
        if message["role"] == "assistant":
            turns += [(dialogue.messages[:number], True), (dialogue.messages[: number + 1], False)]
    return turns


def _formed(dialogue: Dialogue, form: Callable[[str], str]) -> Dialogue:
    return Dialogue(dialogue.task, [{**m, "content": form(m["content"])} for m in dialogue.messages])
