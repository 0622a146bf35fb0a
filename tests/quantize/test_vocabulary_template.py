"""Which chat template counts, how it stands alone, and which token ends a turn in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quantize import chat
from quantize.errors import BadInput
from quantize.vocabulary import read

ROWS = 710
MESSAGES = [{"role": "user", "content": "发热？"}, {"role": "assistant", "content": "多喝水。"}]
NAMED = "{% for m in messages %}" + "{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def folder(damaged: Path) -> Path:
    """A checkpoint without a template."""
    (damaged / "3-dfpo/chat_template.jinja").unlink()
    return damaged / "3-dfpo"


def configure(folder: Path, **values: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def as_transformers_renders(folder: Path) -> str:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False)


def test_the_file_wins_over_the_settings_and_a_given_template_over_both(folder: Path) -> None:
    configure(folder, chat_template=NAMED + "settings")
    assert read(folder, ROWS).chat_template.endswith("settings")
    (folder / "chat_template.jinja").write_text(NAMED + "file")
    assert read(folder, ROWS).chat_template.endswith("file")
    assert as_transformers_renders(folder).endswith("file")
    assert read(folder, ROWS, NAMED + "given").chat_template.endswith("given")


def test_of_several_templates_the_default_is_taken(folder: Path) -> None:
    several = [{"name": "tools", "template": NAMED + "t"}, {"name": "default", "template": NAMED + "d"}]
    configure(folder, chat_template=several)
    assert read(folder, ROWS).chat_template.endswith("d")
    assert as_transformers_renders(folder).endswith("d")
    configure(folder, chat_template=several[:1])
    with pytest.raises(BadInput, match="has the chat templates tools, and none is called default"):
        read(folder, ROWS)


@pytest.mark.parametrize("beginning", ["", "\n", "  ", "\n   ", "{# note #}\n"])
def test_special_tokens_travel_in_the_template(beginning: str, folder: Path) -> None:
    configure(folder, pad_token='<|"quoted"|>', added=1)
    source = json.loads((folder / "tokenizer.json").read_text())
    source["added_tokens"].append({**source["added_tokens"][0], "id": 705, "content": '<|"quoted"|>'})
    (folder / "tokenizer.json").write_text(json.dumps(source))
    template = beginning + (
        "  {% for m in messages %}\n{% if loop.first %}{{ pad_token + eos_token }}{% endif %}"
        "{{ m.content }}{{ eos_token }}\n  {% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    vocabulary = read(folder, ROWS)
    rendered = chat.render(vocabulary.chat_template, MESSAGES)
    assert rendered == as_transformers_renders(folder)
    assert '<|"quoted"|><|im_end|>发热？<|im_end|>' in rendered
    assert vocabulary.tokens[vocabulary.eos] == "<|im_end|>"


def test_a_template_that_names_no_special_token_is_unchanged(folder: Path) -> None:
    configure(folder, chat_template=NAMED)
    assert read(folder, ROWS).chat_template == NAMED


@pytest.mark.parametrize(
    ("after_answer", "eos", "other_end"),
    [
        ("<|im_end|>\n", "<|im_end|>", None),
        ("\n<|endoftext|><|im_end|>", "<|endoftext|>", "<|im_end|>"),
        ("\n\n", "<|im_end|>", None),  # no token ends a turn: the tokenizer's word counts
    ],
)
def test_the_end_of_a_turn(after_answer: str, eos: str, other_end: str | None, folder: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' %}<|im_start|>{% endif %}{{ m.content }}"
    configure(
        folder, chat_template=template + "{% if m.role == 'assistant' %}" + after_answer + "{% endif %}{% endfor %}"
    )
    vocabulary = read(folder, ROWS)
    assert vocabulary.tokens[vocabulary.eos] == eos
    assert (None if vocabulary.other_end is None else vocabulary.tokens[vocabulary.other_end]) == other_end


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"no chat template.*chat_template\.jinja"),
        ("", "no chat template"),
        ("{% for %}", "cannot be rendered"),
        ("{{ messages[0].content + nothing.at.all }}", "cannot be rendered"),
        ("{{ raise_exception('only one turn') }}", "refuses the conversation: only one turn"),
        ("{{ messages[-1].content }}", "drops or repeats a message"),
    ],
)
def test_unusable_templates_are_refused(template: str | None, message: str, folder: Path) -> None:
    configure(folder, chat_template=template)
    with pytest.raises(BadInput, match=message):
        read(folder, ROWS)


def test_a_template_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="is not UTF-8"):
        read(folder, ROWS)


def test_special_tokens_are_found_in_the_map_beside_the_settings(folder: Path) -> None:
    configure(folder, chat_template=NAMED, eos_token=None)
    with pytest.raises(BadInput, match="names no eos_token"):
        read(folder, ROWS)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert read(folder, ROWS).eos == 2
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(BadInput, match="eos_token '<none>' is not in the vocabulary"):
        read(folder, ROWS)
