"""`preview`: what is shown is what the trainer is fed, and nothing in a record reaches the terminal as a command."""

from __future__ import annotations

import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from trainer.commands import preview as command
from trainer.commands.preview import print_preview, visible
from trainer.corpus.record import Message, Record, write_records
from trainer.preview import Document, Preview, preview, small_config
from trainer.recipe import PROJECT, RecipeError, load_recipe
from trainer.stages.build import stage_records

TINY = PROJECT / "tests" / "recipes" / "tiny.yaml"


def _text(document: Document, scored: bool | None = None) -> str:
    return "".join(span.text for span in document.spans if scored is None or span.scored == scored)


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: tuple[Message, ...] | None) -> str:
    return str(tokenizer.apply_chat_template([m.model_dump() for m in messages or ()], tokenize=False))


def _documents(shown: Preview) -> list[Document]:
    return [document for row in shown.rows for document in row.documents]


def test_a_dialogue_is_shown_as_rendered_and_its_answers_are_counted(
    corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = {_rendered(tokenizer, r.messages): r for r in stage_records("sft", corpus)[:4]}
    shown = preview(load_recipe(TINY), corpus, "sft", 4)
    assert {_text(document) for document in _documents(shown)} == set(records)
    for document in _documents(shown):
        messages = records[_text(document)].messages or ()
        answers = [f"{message.content}<|im_end|>" for message in messages if message.role == "assistant"]
        assert _text(document, scored=True) == "".join(answers)
        assert all(span.special == span.text.startswith("<|") for span in document.spans)
        assert not document.dropped


def test_padding_fills_a_batch_up_to_its_longest_row(corpus: Path) -> None:
    rows = preview(load_recipe(TINY), corpus, "sft", 4).rows
    assert len({sum(document.tokens for document in row.documents) + row.padding for row in rows}) == 1
    assert {row.batch for row in rows} == {1}


def test_truncation_says_how_much_is_gone(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A row ends at max_length; a row without any answer left is left out."""
    lengths = [
        len(tokenizer(_rendered(tokenizer, r.messages))["input_ids"])  # type: ignore[arg-type]
        for r in stage_records("sft", corpus)[:6]
    ]
    limit = sorted(lengths)[3] - 1  # the answer's end mark and the line end behind it
    shown = preview(load_recipe(TINY, [f"stages.sft.max_length={limit}"]), corpus, "sft", 6)
    cut = [document for document in _documents(shown) if document.dropped]
    assert len(_documents(shown)) + shown.left_out == 6
    assert {document.tokens for document in cut} == {limit}
    assert {document.dropped + limit for document in cut} <= set(lengths)
    assert sorted(lengths)[3] in {document.dropped + limit for document in cut}


def test_packs_show_their_documents_apart(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = stage_records("sft", corpus)[:5]
    shown = preview(load_recipe(TINY, ["stages.sft.packing=true"]), corpus, "sft", 5)
    (row,) = shown.rows
    assert sorted(map(_text, row.documents)) == sorted(_rendered(tokenizer, record.messages) for record in records)
    assert row.padding == shown.left_out == 0


def test_a_cut_pack_says_what_is_gone(corpus: Path) -> None:
    """Packs in which no answer is left are left out as a whole."""
    shown = preview(load_recipe(TINY, ["stages.sft.packing=true", "stages.sft.max_length=120"]), corpus, "sft", 5)
    documents = _documents(shown)
    assert len(documents) + shown.left_out == 5
    assert all(document.tokens == 120 for document in documents if document.dropped)
    assert any(document.dropped for document in documents)


def test_pairs_have_one_prompt_and_two_masks(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = stage_records("dfpo", corpus)[:2]
    shown = preview(load_recipe(TINY), corpus, "dfpo", 2)
    pairs = {(_text(row.documents[0]), _text(row.documents[1])) for row in shown.rows}
    assert pairs == {
        tuple(_rendered(tokenizer, (*(r.prompt or ()), *(answer or ()))) for answer in (r.chosen, r.rejected))
        for r in records
    }
    for row in shown.rows:
        chosen, rejected = row.documents
        assert (chosen.role, rejected.role) == ("chosen", "rejected")
        assert _text(chosen, scored=False) == _text(rejected, scored=False)
        assert _text(chosen, scored=True) != _text(rejected, scored=True)


def test_prompts_that_fill_max_length_are_left_out(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = sorted(
        len(tokenizer(_rendered(tokenizer, r.prompt) + "<|im_start|>assistant\n")["input_ids"])  # type: ignore[arg-type]
        for r in stage_records("dfpo", corpus)[:3]
    )
    shown = preview(load_recipe(TINY, [f"stages.dfpo.max_length={lengths[1]}"]), corpus, "dfpo", 3)
    assert (shown.left_out, len(shown.rows)) == (2, 1)
    with pytest.raises(RecipeError, match=r"Raise stages\.dfpo\.max_length"):
        preview(load_recipe(TINY, ["stages.dfpo.max_length=20"]), corpus, "dfpo", 3)


def test_long_texts_go_on_in_another_row(corpus: Path) -> None:
    shown = preview(load_recipe(TINY, ["stages.cpt.max_length=50", "stages.cpt.copy_exercises=0"]), corpus, "cpt", 3)
    pieces = _documents(shown)
    assert len(pieces) > 3
    assert sum(not piece.continues for piece in pieces) == 3
    assert {piece.role for piece in pieces} == {"text"}
    assert not any(piece.dropped for piece in pieces)
    assert all(piece.scored == piece.tokens - 1 for piece in pieces)


def test_copy_exercises_are_shown_beside_the_texts(corpus: Path) -> None:
    roles = [document.role for document in _documents(preview(load_recipe(TINY), corpus, "cpt", 2))]
    assert sorted(roles) == ["exercise", "exercise", "text", "text"]


def test_a_seed_draws_the_same_random_records(corpus: Path) -> None:
    recipe = load_recipe(TINY)
    first, again, other, head = (preview(recipe, corpus, "mue", 3, seed) for seed in (1, 1, 2, None))
    assert first == again
    assert len({str(shown.rows) for shown in (first, other, head)}) == 3


@pytest.mark.parametrize("config", [Qwen3Config(), Qwen2Config(), LlamaConfig()], ids=lambda config: config.model_type)
def test_small_models_keep_architecture_and_vocabulary(config: Qwen3Config) -> None:
    small = small_config(config)
    assert type(small) is type(config)
    assert small.vocab_size == config.vocab_size
    assert (small.num_hidden_layers, small.hidden_size) == (1, 8)


# --- terminal

ATTACK = "\x1b]0;owned\x07\x1b[2J\x9b31m\x00\x7f\u202eabc\u2028\r[bold red]not markup[/]"


@pytest.fixture
def attacked(corpus: Path, tmp_path: Path) -> Path:
    """A corpus whose dialogues and pairs carry terminal commands."""
    folder = tmp_path / "attacked"
    shutil.copytree(corpus, folder)
    dialogue, pair = stage_records("sft", corpus)[0], stage_records("dfpo", corpus)[0]
    assert dialogue.messages
    assert pair.prompt
    bad = Message(role="assistant", content=ATTACK)
    write_records(folder / "sft.jsonl", [Record(**{**dict(dialogue), "messages": (*dialogue.messages[:-1], bad)})])
    write_records(folder / "preferences.jsonl", [Record(**{**dict(pair), "rejected": (bad,)})])
    return folder


def _printed(shown: Preview, plain: bool, width: int = 100) -> str:
    out = StringIO()
    colours = None if plain else "standard"
    console = Console(file=out, width=width, force_terminal=not plain, color_system=colours, highlight=False)
    print_preview(shown, console, plain)
    return out.getvalue()


@pytest.mark.parametrize("stage", ["sft", "dfpo"])
def test_terminal_commands_in_records_are_only_shown(attacked: Path, stage: str) -> None:
    shown = preview(load_recipe(TINY), attacked, stage, 1)
    assert ATTACK in _text(shown.rows[0].documents[-1])
    out = _printed(shown, plain=True)
    assert not [character for character in out if character != "\n" and not character.isprintable()]
    assert "␛]0;owned␇␛[2J�31m␀␡�abc�␍[bold red]not markup[/]" in out.replace("\n", "")
    # In colour the only commands are rich's own: colours and styles.
    coloured = re.sub(r"\x1b\[[0-9;]*m", "", _printed(shown, plain=False))
    assert not [character for character in coloured if character != "\n" and not character.isprintable()]


def test_json_is_exact_and_harmless(attacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = command.as_json(preview(load_recipe(TINY), attacked, "sft", 1))
    spans = json.loads(text)["rows"][0]["documents"][0]["spans"]
    assert ATTACK in "".join(span["text"] for span in spans)
    assert not [character for character in text if ord(character) < 32 or 127 <= ord(character) < 160]


def test_joined_emoji_stay_whole() -> None:
    assert visible("👨\u200d👩\u200d👧 38.5℃\n") == "👨\u200d👩\u200d👧 38.5℃↵\n"


def test_colours_mark_what_is_counted(corpus: Path) -> None:
    shown = preview(load_recipe(TINY), corpus, "dfpo", 1)
    out = _printed(shown, plain=False, width=200)
    chosen, rejected = shown.rows[0].documents
    assert f"\x1b[1;32m{_text(chosen, scored=True).splitlines()[0]}" in out
    assert f"\x1b[1;35m{_text(rejected, scored=True).splitlines()[0]}" in out
    assert "\x1b[2msystem" in out
    assert "\x1b[2;4m<|im_start|>" in out


def test_lines_are_as_wide_as_chinese_is(corpus: Path) -> None:
    lines = _printed(preview(load_recipe(TINY), corpus, "mue", 3), plain=True, width=40).splitlines()
    assert max(map(cell_len, lines)) <= 40
    assert any(cell_len(line) > 36 and len(line) < 25 for line in lines)  # a full line of Chinese


# --- command


def test_plain_marks_and_exit_code(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(TINY), "--corpus", str(corpus), "-n", "1", "--plain"]) == 0
    out = capsys.readouterr().out
    assert out.count("【") == out.count("】") == 2  # the legend's and the answer's
    assert "<|im_end|>】" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stages.sft.bach_size=1"], "did you mean 'batch_size'"),
        (["corpus.cards=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(TINY), *arguments, "--corpus", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["-n", "0"], ["--stage", "rlhf"]])
def test_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        command.main([str(TINY), *arguments])
    assert exit.value.code == 2
