"""Builds a PedCorpus folder from the cards: same recipe, same seed → byte-identical files."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from trainer import prompts, tokenizer
from trainer.corpus.cards import Card, load_cards
from trainer.corpus.dialogues import DialogueBuilder, Turn
from trainer.corpus.phrasing import Phrasing
from trainer.corpus.record import CorpusError, Message, Record, Source, Split, Task, write_records
from trainer.recipe import Recipe

Progress = Callable[[str, int], None]
MANIFEST = "manifest.json"
STAGE_FILES = ("cpt.jsonl", "sft.jsonl", "preferences.jsonl", "mue.jsonl")
_LICENCE = "Apache-2.0"
# Share of each kind among the SFT dialogues; the rest are knowledge and treatment questions in equal parts.
_REFUSALS, _SPECIAL, _DIAGNOSIS = 0.12, 0.03, 0.25
# How often an answer is framed humanely: rarely in SFT, so that DFPO has something to teach; mostly after it.
_HUMANE_SFT, _HUMANE_MUE = 0.15, 0.9


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corpus_key(recipe: Recipe) -> str:
    """Digest of all that decides a corpus made of cards: its recipe, seed, cards, phrasings and prompts."""
    digest = hashlib.sha256(recipe.corpus.model_dump_json(exclude={"cards", "records"}).encode())
    digest.update(str(recipe.seed).encode())
    own = [
        *Path(__file__).parent.glob("*.py"),
        Path(__file__).parent / "phrasings.yaml",
        prompts.PROMPTS_FILE,
        Path(prompts.__file__),
        Path(tokenizer.__file__),
    ]
    for path in [*sorted(_cards_folder(recipe).glob("*.md")), *sorted(own)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def data_sha256(folder: Path) -> str:
    """Digest of a corpus' records: what a run depends on, however they were made."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(manifest["sha256"], sort_keys=True).encode()).hexdigest()


def is_current(folder: Path, recipe: Recipe) -> bool:
    """Whether `folder` already holds the corpus of this recipe.

    A recipe with `records` builds nothing: its folder is checked with `check_records`, which raises CorpusError.
    """
    if recipe.corpus.records:
        check_records(folder)
        return True
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return manifest.get("key") == corpus_key(recipe)


def check_records(folder: Path) -> None:
    """Holds a finished corpus against its manifest; CorpusError names the first file that differs."""
    try:
        digests = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CorpusError(
            f"{folder} is not a finished corpus: its {MANIFEST} is missing or unreadable. "
            "Check corpus.records, or build the corpus again."
        ) from None
    for name in [*STAGE_FILES, *digests]:
        if name not in digests or not (folder / name).is_file():
            raise CorpusError(f"{folder / name} is missing. Build the corpus again or copy it again.")
        if sha256(folder / name) != digests[name]:
            raise CorpusError(
                f"{folder / name} is not the file that {MANIFEST} describes (its sha256 differs): it was changed or "
                "damaged. Build the corpus again or copy it again."
            )


def build_corpus(recipe: Recipe, folder: Path, progress: Progress = lambda name, count: None) -> dict:
    """Builds the corpus of the recipe's cards; returns its manifest.

    Raises CorpusError for unreadable cards or a held-out card that does not exist.
    """
    settings, seed = recipe.corpus, recipe.seed
    cards = load_cards(_cards_folder(recipe))
    unknown = set(settings.held_out_cards) - {card.id for card in cards}
    if unknown:
        raise CorpusError(f"corpus.held_out_cards names cards that do not exist: {', '.join(sorted(unknown))}.")
    seen = [card for card in cards if card.id not in settings.held_out_cards]
    unseen = [card for card in cards if card.id in settings.held_out_cards]
    if len(seen) < 2:
        raise CorpusError("A corpus needs at least two cards that are not held out (one is the other's distractor).")
    count = settings.held_out
    text_split: Split = "held_out_cards" if unseen else "held_out_questions"
    files: dict[str, Iterable[Record]] = {
        "cpt": _texts(seen, settings.texts, seed, "train"),
        "sft": chain(
            _dialogues(seen, seen, settings.selections, seed + 6, "train", _HUMANE_SFT, headings_only=True),
            _dialogues(seen, seen, settings.dialogues, seed + 1, "train", _HUMANE_SFT),
        ),
        "preferences": _preferences(seen, settings.preferences, seed + 2, "train"),
        "mue": _dialogues(seen, seen, settings.task_dialogues, seed + 3, "train", _HUMANE_MUE),
        "held_out_questions": _dialogues(seen, seen, count, seed + 4, "held_out_questions", _HUMANE_MUE),
        "held_out_texts": _texts(unseen or seen, count, seed + 7, text_split),
        "held_out_preferences": _preferences(seen, count // 4, seed + 8, "held_out_questions"),
    }
    if unseen:
        files["held_out_cards"] = _dialogues(unseen, cards, count, seed + 5, "held_out_cards", _HUMANE_MUE)
    manifest = {
        "name": recipe.name,
        "key": corpus_key(recipe),
        "seed": seed,
        "recipe": settings.model_dump(mode="json", exclude={"cards", "records"}),
        "held_out_cards": sorted(settings.held_out_cards),
        "sources": {path.name: sha256(path) for path in sorted(_cards_folder(recipe).glob("*.md"))},
    }
    return write_corpus(folder, files, manifest, progress)


def write_corpus(
    folder: Path,
    files: Mapping[str, Iterable[Record]],
    manifest: Mapping[str, Any],
    progress: Progress = lambda name, count: None,
) -> dict:
    """Writes NAME.jsonl for each of `files` aside and renames the folder into place, whatever its records come from.

    Returns `manifest` (name, seed, sources …) with the `counts` and `sha256` of the files added, as it is written.
    Raises CorpusError when `folder` holds something that is not a corpus.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise CorpusError(f"{folder} holds something that is not a corpus. Give another --output.")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        counts = {}
        for name, records in files.items():
            counts[name] = write_records(part / f"{name}.jsonl", records)
            progress(name, counts[name])
        digests = {f"{name}.jsonl": sha256(part / f"{name}.jsonl") for name in files}
        complete = {**manifest, "counts": counts, "sha256": digests}
        (part / MANIFEST).write_text(json.dumps(complete, ensure_ascii=False, indent=1), encoding="utf-8")
    except BaseException:  # Ctrl-C too: nothing half-written stays
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return complete


def _cards_folder(recipe: Recipe) -> Path:
    if recipe.corpus.cards is None:
        raise CorpusError(
            f"This recipe uses the finished corpus {recipe.corpus.records}: there is nothing to build. "
            "Set corpus.cards to a folder of cards to build one."
        )
    return recipe.corpus.cards


def _source(card: Card) -> Source:
    return Source(name="PediatricsGPT cards", licence=_LICENCE, reference=f"{card.id}: {card.reference}")


def _texts(cards: list[Card], count: int, seed: int, split: Split) -> Iterator[Record]:
    """CPT text: sections as prose, and instruction data rewritten as completion text (the paper's hybrid).

    Held-out text about cards that training sees has questions only: as prose it would be a training text.
    """
    rng = random.Random(seed)
    held_out_questions = split == "held_out_questions"
    phrasing = Phrasing(rng, "held_out" if held_out_questions else "train")
    for index in range(count):
        card = rng.choice(cards)
        section = rng.choice(list(card.sections.values()))
        body = prompts.lines(section.sentences)
        if not held_out_questions and rng.random() < 0.5:
            text = f"{card.title}·{section.section}：\n{body}"
        else:
            asked = card.asked.get(section.section, ())
            text = f"问：{phrasing.named(section.section, rng.choice(card.names), asked)}\n答：{body}"
        yield Record(
            id=f"{'cpt' if split == 'train' else 'held-out-text'}-{index}", kind="text", task="general",
            source=_source(card), age_group=card.ages, split=split, group=card.id, text=text,
        )  # fmt: skip


def _dialogues(
    cards: list[Card],
    others: list[Card],
    count: int,
    seed: int,
    split: Split,
    humane: float,
    headings_only: bool = False,
) -> Iterator[Record]:
    rng = random.Random(seed)
    builder = DialogueBuilder(cards, others, rng, split, headings_only)
    for index in range(count):
        task, kind, card, turns = _draw(builder, rng)
        messages = _messages(task, turns, rng, humane)
        yield Record(
            id=f"{split}-{seed}-{index}", kind="dialogue", task=kind, source=_source(card), age_group=card.ages,
            split=split, group=card.id, messages=tuple(messages),
        )  # fmt: skip


def _draw(builder: DialogueBuilder, rng: random.Random) -> tuple[Task, Task, Card, list[Turn]]:
    """One dialogue: the prompt's task, the record's task, its card and its turns."""
    draw = rng.random()
    if draw < _REFUSALS:
        task, card, turns = builder.refusal()
        return task, "safety", card, turns
    if draw < _REFUSALS + _SPECIAL:
        kind = rng.choice(["identity", "prescription"])
        task, card, turns = builder.special(kind)
        return task, "identity" if kind == "identity" else "safety", card, turns
    if draw < _REFUSALS + _SPECIAL + _DIAGNOSIS:
        task, card, turns = builder.diagnosis()
    else:
        task, card, turns = rng.choice([builder.knowledge, builder.treatment])()
    return task, task, card, turns


def _messages(task: str, turns: list[Turn], rng: random.Random, humane: float) -> list[Message]:
    messages = [Message(role="system", content=prompts.system(task))]
    for turn in turns:
        messages.append(Message(role="user", content=prompts.user(turn.question, turn.passages)))
        messages.append(Message(role="assistant", content=turn.answer(rng, humane)))
    return messages


def _preferences(cards: list[Card], count: int, seed: int, split: Split) -> Iterator[Record]:
    """DFPO pairs: the same passage, framed humanely and with a referral, preferred to the plain answer."""
    rng = random.Random(seed)
    builder = DialogueBuilder(cards, cards, rng, split)
    for index in range(count):
        task, card, turns = rng.choice([builder.knowledge, builder.treatment, builder.diagnosis])()
        turn = turns[0]
        prompt = (
            Message(role="system", content=prompts.system(task)),
            Message(role="user", content=prompts.user(turn.question, turn.passages)),
        )
        yield Record(
            id=f"{'preference' if split == 'train' else 'held-out-preference'}-{index}", kind="preference", task=task,
            source=_source(card), age_group=card.ages, split=split, group=card.id, prompt=prompt,
            chosen=(Message(role="assistant", content=turn.answer(rng, humane=1.0)),),
            rejected=(Message(role="assistant", content=turn.answer(rng, humane=0.0)),),
        )  # fmt: skip
