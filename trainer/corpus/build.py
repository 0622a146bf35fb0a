"""Builds a PedCorpus folder from the cards: same recipe, same seed → byte-identical files."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from trainer import prompts, tokenizer
from trainer.corpus.cards import Card, load_cards
from trainer.corpus.dialogues import DialogueBuilder, Turn
from trainer.corpus.phrasing import Phrasing
from trainer.corpus.record import CorpusError, Message, Record, Source, Split, Task, write_records
from trainer.recipe import CorpusRecipe, Recipe

MANIFEST = "manifest.json"
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
    """Digest of all that decides the corpus: its recipe, the seed, the cards, the phrasings, the prompts."""
    digest = hashlib.sha256(recipe.corpus.model_dump_json(exclude={"cards"}).encode())
    digest.update(str(recipe.seed).encode())
    own = [
        *Path(__file__).parent.glob("*.py"),
        Path(__file__).parent / "phrasings.yaml",
        prompts.PROMPTS_FILE,
        Path(prompts.__file__),
        Path(tokenizer.__file__),
    ]
    for path in [*sorted(recipe.corpus.cards.glob("*.md")), *sorted(own)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def data_sha256(folder: Path) -> str:
    """Digest of a corpus' records: what a run depends on, however they were made."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(manifest["sha256"], sort_keys=True).encode()).hexdigest()


def is_current(folder: Path, recipe: Recipe) -> bool:
    """Whether `folder` already holds the corpus of this recipe."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return manifest.get("key") == corpus_key(recipe)


def build_corpus(recipe: Recipe, folder: Path, progress: Callable[[str, int], None] = lambda name, count: None) -> dict:
    """Writes the corpus aside and renames it into place; returns its manifest.

    Raises CorpusError for unreadable cards or a held-out card that does not exist.
    """
    settings = recipe.corpus
    cards = load_cards(settings.cards)
    unknown = set(settings.held_out_cards) - {card.id for card in cards}
    if unknown:
        raise CorpusError(f"corpus.held_out_cards names cards that do not exist: {', '.join(sorted(unknown))}.")
    seen = [card for card in cards if card.id not in settings.held_out_cards]
    unseen = [card for card in cards if card.id in settings.held_out_cards]
    if len(seen) < 2:
        raise CorpusError("A corpus needs at least two cards that are not held out (one is the other's distractor).")
    files = {
        "cpt": _texts(seen, settings, recipe.seed),
        "sft": chain(
            _dialogues(seen, seen, settings.selections, recipe.seed + 6, "train", _HUMANE_SFT, headings_only=True),
            _dialogues(seen, seen, settings.dialogues, recipe.seed + 1, "train", _HUMANE_SFT),
        ),
        "preferences": _preferences(seen, settings.preferences, recipe.seed + 2),
        "mue": _dialogues(seen, seen, settings.task_dialogues, recipe.seed + 3, "train", _HUMANE_MUE),
        "held_out_questions": _dialogues(
            seen, seen, settings.held_out, recipe.seed + 4, "held_out_questions", _HUMANE_MUE
        ),
    }
    if unseen:
        files["held_out_cards"] = _dialogues(
            unseen, cards, settings.held_out, recipe.seed + 5, "held_out_cards", _HUMANE_MUE
        )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise CorpusError(f"{folder} holds something that is not a corpus. Give another --output.")
    part.mkdir(parents=True)
    try:
        manifest = _write(recipe, files, part, progress)
    except BaseException:  # Ctrl-C too: nothing half-written stays
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return manifest


def _write(
    recipe: Recipe, files: dict[str, Iterator[Record]], part: Path, progress: Callable[[str, int], None]
) -> dict:
    """Writes the records and the manifest into `part`."""
    settings = recipe.corpus
    counts = {}
    for name, records in files.items():
        counts[name] = write_records(part / f"{name}.jsonl", records)
        progress(name, counts[name])
    manifest = {
        "name": recipe.name,
        "key": corpus_key(recipe),
        "seed": recipe.seed,
        "recipe": settings.model_dump(mode="json", exclude={"cards"}),
        "held_out_cards": sorted(settings.held_out_cards),
        "counts": counts,
        "sha256": {f"{name}.jsonl": sha256(part / f"{name}.jsonl") for name in files},
        "sources": {path.name: sha256(path) for path in sorted(settings.cards.glob("*.md"))},
    }
    (part / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    return manifest


def _source(card: Card) -> Source:
    return Source(name="PediatricsGPT cards", licence=_LICENCE, reference=f"{card.id}: {card.reference}")


def _texts(cards: list[Card], settings: CorpusRecipe, seed: int) -> Iterator[Record]:
    """CPT text: sections as prose, and instruction data rewritten as completion text (the paper's hybrid)."""
    rng = random.Random(seed)
    phrasing = Phrasing(rng, "train")
    for index in range(settings.texts):
        card = rng.choice(cards)
        section = rng.choice(list(card.sections.values()))
        body = prompts.lines(section.sentences)
        if rng.random() < 0.5:
            text = f"{card.title}·{section.section}：\n{body}"
        else:
            asked = card.asked.get(section.section, ())
            text = f"问：{phrasing.named(section.section, rng.choice(card.names), asked)}\n答：{body}"
        yield Record(
            id=f"cpt-{index}", kind="text", task="general", source=_source(card), age_group=card.ages,
            split="train", group=card.id, text=text,
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


def _preferences(cards: list[Card], count: int, seed: int) -> Iterator[Record]:
    """DFPO pairs: the same passage, framed humanely and with a referral, preferred to the plain answer."""
    rng = random.Random(seed)
    builder = DialogueBuilder(cards, cards, rng, "train")
    for index in range(count):
        task, card, turns = rng.choice([builder.knowledge, builder.treatment, builder.diagnosis])()
        turn = turns[0]
        prompt = (
            Message(role="system", content=prompts.system(task)),
            Message(role="user", content=prompts.user(turn.question, turn.passages)),
        )
        yield Record(
            id=f"preference-{index}", kind="preference", task=task, source=_source(card), age_group=card.ages,
            split="train", group=card.id, prompt=prompt,
            chosen=(Message(role="assistant", content=turn.answer(rng, humane=1.0)),),
            rejected=(Message(role="assistant", content=turn.answer(rng, humane=0.0)),),
        )  # fmt: skip
