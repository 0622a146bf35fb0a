"""A tiny model and a tiny library for the tests of the consultation room."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_tokenizer, write_model

from tui.consultation import Answer, Consultation, Finished
from tui.engine.process import Engine
from tui.library import Library

PROJECT = Path(__file__).resolve().parent.parent.parent
CARDS = Path(__file__).parent / "cards"


@pytest.fixture(scope="session")
def prompts() -> dict[str, Any]:
    """The prompts of the demonstration model, as they travel in its GGUF."""
    return json.loads((PROJECT / "trainer" / "prompts" / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The Hugging Face tokenizer whose vocabulary the tiny model has."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, prompts: dict[str, Any], tokenizer: Any) -> Path:
    """A tiny random demonstration model."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", prompts, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def big_gguf(tmp_path_factory: pytest.TempPathFactory, prompts: dict[str, Any], tokenizer: Any) -> Path:
    """The same with wider layers, slow enough to be stopped while it reads or writes."""
    path = tmp_path_factory.mktemp("model") / "big.gguf"
    return write_model(path, prompts, tokenizer=tokenizer, width=512, forward=4096, layers=6, context=16384)


@pytest.fixture(scope="session")
def library() -> Library:
    """Five small cards."""
    return Library.load(CARDS)


@pytest.fixture
def engine(tiny_gguf: Path) -> Iterator[Engine]:
    """A ready engine with the tiny model."""
    with Engine.start(tiny_gguf, threads=1) as engine:
        engine.wait_ready(60)
        yield engine


@pytest.fixture(scope="session")
def finish() -> Callable[[Consultation, str], Answer]:
    """Asks and returns the whole answer."""

    def whole(consultation: Consultation, question: str) -> Answer:
        *_, last = consultation.ask(question)
        assert isinstance(last, Finished)
        return last.answer

    return whole
