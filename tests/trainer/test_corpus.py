"""The corpus: reproducible, held-out questions and cards kept out, answers made of the right passage."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer import prompts
from trainer.corpus.build import build_corpus, check_records, is_current, sha256, write_corpus
from trainer.corpus.cards import load_cards
from trainer.corpus.phrasing import phrasings
from trainer.corpus.record import CorpusError, Record, read_records
from trainer.evaluate.embedded import load_questions
from trainer.recipe import PROJECT, CorpusRecipe, Recipe, load_recipe

HELD_OUT = "teething"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    recipe = load_recipe(PROJECT / "tests" / "recipes" / "tiny.yaml")
    return recipe.model_copy(
        update={"corpus": recipe.corpus.model_copy(update={"dialogues": 600, "selections": 200, "texts": 300})}
    )


@pytest.fixture(scope="module")
def folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    build_corpus(recipe, folder)
    return folder


def _records(folder: Path, name: str) -> list[Record]:
    return list(read_records(folder / f"{name}.jsonl"))


def test_same_recipe_same_bytes(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    manifest = build_corpus(recipe, tmp_path / "again")
    assert manifest["sha256"] == {name: sha256(folder / name) for name in manifest["sha256"]}
    assert is_current(folder, recipe)
    assert not is_current(folder, recipe.model_copy(update={"seed": 99}))


def test_a_held_out_card_never_reaches_training(folder: Path) -> None:
    card = next(card for card in load_cards(PROJECT / "tui" / "library" / "cards") if card.id == HELD_OUT)
    own = {sentence for section in card.sections.values() for sentence in section.sentences}
    for name in ("cpt", "sft", "preferences", "mue", "held_out_questions", "held_out_preferences"):
        text = (folder / f"{name}.jsonl").read_text(encoding="utf-8")
        assert not [sentence for sentence in own if sentence in text], name
    for name in ("held_out_cards", "held_out_texts"):
        assert {record.group for record in _records(folder, name)} == {HELD_OUT}


def test_held_out_phrasings_never_reach_training(folder: Path) -> None:
    tables = phrasings()
    cores = [core for section in tables["sections"].values() for core in section["held_out"]]
    trained = "".join((folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("cpt", "sft", "mue"))
    for core in cores:
        for piece in core.split("{d}"):
            assert len(piece) < 5 or piece not in trained, piece


def _bare(question: str) -> str:
    """A question without what the builders vary: punctuation, spaces, endings."""
    return re.sub(r"[\W_]|[呢啊呀吧吗]$", "", question)


@pytest.mark.parametrize("name", ["test", "development"])
def test_evaluation_questions_cannot_be_drawn_in_training(name: str) -> None:
    """Held against everything the tables can make of a card's names and its own short questions."""
    tables = phrasings()
    made = {_bare(text) for kind in ("out_of_scope", "identity", "prescription") for text in tables[kind]["train"]}
    for card in load_cards(PROJECT / "tui" / "library" / "cards"):
        for named in card.names:
            for section in card.sections:
                made |= {_bare(core.format(d=named)) for core in tables["sections"][section]["train"]}
                for asked in card.asked.get(section, ()):
                    made |= {_bare(core.format(d=named, q=asked)) for core in tables["own"]["named"]}
    assert not [question.question for question in load_questions(name) if _bare(question.question) in made]


def test_answers_quote_the_passage_they_cite(folder: Path) -> None:
    phrases = prompts.prompts()["phrases"]
    fixed = {phrases["refusal"], phrases["identity"], phrases["prescription"]}
    seen = 0
    for record in _records(folder, "sft"):
        messages = record.messages or ()
        for question, answer in zip(messages[1::2], messages[2::2], strict=True):
            if answer.content in fixed:
                continue
            cited = re.search(r"根据.+\[(\d)\]：\n", answer.content)
            assert cited, answer.content
            body = answer.content[cited.end() :]
            for closing in phrases["closings"]:
                body = body.removesuffix(closing)
            passage = re.split(r"\[\d\].+?：\n", question.content.split("问题：")[0])[int(cited[1])]
            assert bool(body) == bool(passage)  # selection exercises have headings only
            assert passage.startswith(body)
            seen += 1
    assert seen > 300


def test_a_refusal_cannot_be_told_by_the_length_of_its_passages(folder: Path) -> None:
    refusal = prompts.prompts()["phrases"]["refusal"]
    lengths: dict[bool, list[float]] = {True: [], False: []}
    for record in _records(folder, "sft"):
        messages = record.messages or ()
        passages = messages[1].content.split("问题：")[0]
        if messages[2].content.count("\n") > 0 and "。\n" in passages:
            count = max(1, len(re.findall(r"^\[\d\]", passages, re.M)))
            lengths[messages[2].content == refusal].append(len(passages) / count)
    means = {refused: sum(values) / len(values) for refused, values in lengths.items()}
    assert 0.7 < means[True] / means[False] < 1.4


def test_a_folder_that_is_no_corpus_is_never_replaced(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CorpusError, match="not a corpus"):
        build_corpus(recipe, tmp_path)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_every_kind_of_dialogue_is_there(folder: Path) -> None:
    records = _records(folder, "sft")
    assert {record.task for record in records} == {"knowledge", "diagnosis", "treatment", "safety", "identity"}
    assert any(len(record.messages or ()) >= 5 for record in records if record.task == "diagnosis")
    refusal = prompts.prompts()["phrases"]["refusal"]
    refused = [record for record in records if (record.messages or ())[-1].content == refusal]
    assert 0.08 < len(refused) / len(records) < 0.25


def test_preferred_answers_are_framed_humanely(folder: Path) -> None:
    closings = tuple(prompts.prompts()["phrases"]["closings"])
    for record in _records(folder, "preferences"):
        assert (record.chosen or ())[0].content.endswith(closings)
        assert not (record.rejected or ())[0].content.endswith(closings)


def test_held_out_texts_and_pairs_are_as_many_as_asked_and_new(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    without = recipe.corpus.model_copy(update={"held_out_cards": (), "texts": 2000, "preferences": 400})
    build_corpus(recipe.model_copy(update={"corpus": without}), tmp_path / "all")
    for corpus in (folder, tmp_path / "all"):
        texts, pairs = _records(corpus, "held_out_texts"), _records(corpus, "held_out_preferences")
        assert (len(texts), len(pairs)) == (8, 2)
        assert {record.kind for record in texts} == {"text"}
        assert {record.split for record in pairs} == {"held_out_questions"}
        assert not {record.text for record in texts} & {record.text for record in _records(corpus, "cpt")}
        prompts_seen = {record.prompt for record in _records(corpus, "preferences")}
        assert not {record.prompt for record in pairs} & prompts_seen
    assert {record.split for record in _records(folder, "held_out_texts")} == {"held_out_cards"}
    assert {record.split for record in _records(tmp_path / "all", "held_out_texts")} == {"held_out_questions"}
    # About cards that training sees, only questions that training never asks.
    held_out = [core for section in phrasings()["sections"].values() for core in section["held_out"]]
    pieces = {max(core.split("{d}"), key=len) for core in held_out}
    asked = [(record.text or "").partition("\n答：")[0] for record in _records(tmp_path / "all", "held_out_texts")]
    recognised = [question for question in asked if any(piece in question for piece in pieces)]
    assert len(recognised) > len(asked) / 2, asked  # dialect and slips of the pen hide some


def test_a_corpus_of_other_sources_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    records = _records(folder, "cpt")[:3]
    manifest = write_corpus(tmp_path / "own", {"cpt": iter(records), "mue": []}, {"name": "own", "seed": 5})
    assert manifest["counts"] == {"cpt": 3, "mue": 0}
    assert manifest["sha256"]["cpt.jsonl"] == sha256(tmp_path / "own" / "cpt.jsonl")
    assert manifest["name"] == "own"
    assert _records(tmp_path / "own", "cpt") == records

    def broken() -> Iterator[Record]:
        yield records[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "own", {"cpt": broken()}, {})
    assert _records(tmp_path / "own", "cpt") == records
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_finished_corpus_is_held_against_its_manifest(folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    copy = tmp_path / "finished"
    shutil.copytree(folder, copy)
    finished = recipe.model_copy(update={"corpus": CorpusRecipe(records=copy)})
    assert is_current(copy, finished)
    with pytest.raises(CorpusError, match="nothing to build"):
        build_corpus(finished, tmp_path / "new")
    data = (copy / "held_out_texts.jsonl").read_bytes()
    (copy / "held_out_texts.jsonl").write_bytes(data[:-2] + b" \n")
    with pytest.raises(CorpusError, match=r"held_out_texts\.jsonl is not the file that manifest\.json describes"):
        is_current(copy, finished)
    (copy / "held_out_texts.jsonl").write_bytes(data)
    check_records(copy)
    (copy / "mue.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"mue\.jsonl is missing"):
        check_records(copy)
    write_corpus(tmp_path / "half", {"cpt": [], "sft": [], "mue": []}, {})
    with pytest.raises(CorpusError, match=r"preferences\.jsonl is missing"):
        check_records(tmp_path / "half")
    for content in ("{", "[]", '{"sha256": 1}', '{"sha256": ["cpt.jsonl"]}'):
        (copy / "manifest.json").write_text(content, encoding="utf-8")
        with pytest.raises(CorpusError, match="not a finished corpus"):
            check_records(copy)


def test_bad_input_is_named(recipe: Recipe, tmp_path: Path) -> None:
    corpus = recipe.corpus.model_copy(update={"held_out_cards": ("no-such-card",)})
    with pytest.raises(CorpusError, match="no-such-card"):
        build_corpus(recipe.model_copy(update={"corpus": corpus}), tmp_path / "x")
    with pytest.raises(CorpusError, match="no cards"):
        load_cards(tmp_path)
    (tmp_path / "card.md").write_bytes("---\ntitle: \xd5\n---\n".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"card\.md is not UTF-8"):
        load_cards(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"id": "a"}\n', encoding="utf-8")
    with pytest.raises(CorpusError, match="line 1"):
        list(read_records(tmp_path / "records.jsonl"))
