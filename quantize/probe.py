"""A GGUF opened by llama.cpp itself: token ids, logits, end of generation.

Run as `python -m quantize.probe REQUEST.json` in a child process (see child.py), because llama.cpp aborts
the process on a malformed file.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantize import child

_SMALL_BYTES = 64 << 20  # below, one thread is faster: several would mostly wait for each other
_BATCH = 64  # positions per decode; bounds the logits buffer to as many rows
_AHEAD = 2  # blocks of logits that may wait on the disk

# (number of the sequence, its position of the first row, logits [rows, vocabulary])
Block = Callable[[int, int, np.ndarray], None]


@dataclass(frozen=True)
class Request:
    """What llama.cpp is asked.

    strings: texts to tokenise as plain text. segments: per conversation ["plain" | "control", text] pairs.
    sequences: token ids whose logits at every position are wanted. prompts: token ids to continue greedily until an
    end-of-generation token or `limit` tokens. The last two need the weights. adapter: a GGUF LoRA file to put on top.
    """

    strings: list[str] = field(default_factory=list)
    segments: list[list[list[str]]] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    limit: int = 1
    adapter: str = ""


@dataclass(frozen=True)
class Answer:
    """What came back.

    strings, segments: token ids. restored: for each string the text its tokens stand for. generated: ids of each
    greedy answer, the end token included, and `texts`, how they read. eog: whether `eos` ends generation; ended: per
    greedy answer whether it did.
    """

    strings: list[list[int]]
    restored: list[str]
    segments: list[list[int]]
    generated: list[list[int]]
    texts: list[str]
    ended: list[bool]
    eos: int
    eog: bool
    vocabulary: int


def probe(
    model: Path, request: Request, folder: Path, progress: Callable[[int, int], None], block: Block | None = None
) -> Answer:
    """Asks a child process. Each block of logits goes to `block` as soon as it is computed, in order; at most
    two of them are ever on the disk, in `folder`, and one in memory.

    Without sequences and prompts only the vocabulary is loaded, no weights. Raises child.ChildFailed.
    """

    def heard(done: int, total: int, number: int = -1, start: int = 0) -> None:
        if number >= 0:
            file = folder / f"block-{done}.npy"
            logits = np.load(file)
            file.unlink()
            if block is not None:
                block(number, start, logits)
        progress(done, total)

    answer = child.run("quantize.probe", {"model": str(model), "folder": str(folder), **asdict(request)}, folder, heard)
    return Answer(**answer)


class _Vocabulary:
    """A file of which llama.cpp has read the vocabulary."""

    def __init__(self, path: str, *, weights: bool) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._log = child.redirect_log(
            llama_cpp, lambda text: child.say(log=text.strip()) if text.strip(" .\n") else None
        )
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = not weights
        self.model: Any = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise SystemExit(3)
        self.vocabulary: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.size: int = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def tokenise(self, text: str, *, control: bool) -> list[int]:
        data = text.encode()
        tokens = (self.api.llama_token * (len(data) + 8))()
        count = self.api.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), False, control)
        return list(tokens[:count])

    def text(self, ids: list[int]) -> str:
        """What the tokens stand for, control tokens left out; not llama_detokenize, which may drop spaces."""
        pieces = []
        for token in ids:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                count = self.api.llama_token_to_piece(self.vocabulary, token, buffer, size, 0, False)
                if count >= 0:
                    break
                size = -count
            pieces.append(buffer.raw[:count])
        return b"".join(pieces).decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        return bool(self.api.llama_vocab_is_eog(self.vocabulary, token))


class _Model(_Vocabulary):
    """A model with one context whose cache is float32, so that only the weights' precision is compared."""

    def __init__(self, path: str, context: int, adapter: str = "") -> None:
        super().__init__(path, weights=True)
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = _BATCH
        threads = 1 if os.path.getsize(path) < _SMALL_BYTES else os.cpu_count() or 1
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
        parameters.flash_attn_type = 0  # disabled: its accumulation differs from the reference's
        self.context: Any = self.api.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit(3)
        if adapter:
            self._put_on(adapter)
        self._batch = self.api.llama_batch_init(_BATCH, 0, 1)

    def _put_on(self, adapter: str) -> None:
        loaded = self.api.llama_adapter_lora_init(self.model, adapter.encode())
        if not loaded:
            raise SystemExit(3)
        pointers = (self.api.llama_adapter_lora_p_ctypes * 1)(loaded)
        if self.api.llama_set_adapters_lora(self.context, pointers, 1, (ctypes.c_float * 1)(1.0)) != 0:
            raise SystemExit(3)

    def forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int], position: int) -> np.ndarray:
        """Logits [len(tokens), vocabulary] of at most _BATCH tokens that follow `position` cached ones.

        The array is llama.cpp's own memory, overwritten by the next call.
        """
        self._batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            self._batch.token[index] = token
            self._batch.pos[index] = position + index
            self._batch.n_seq_id[index] = 1
            self._batch.seq_id[index][0] = 0
            self._batch.logits[index] = 1
        if self.api.llama_decode(self.context, self._batch) != 0:
            raise SystemExit(4)
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape=(len(tokens), self.size))

    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """Greedy continuation up to and including the first end-of-generation token."""
        self.forget()
        generated: list[int] = []
        logits = np.empty(0)
        for start in range(0, len(prompt), _BATCH):
            logits = self.decode(prompt[start : start + _BATCH], start)[-1]
        while True:
            generated.append(int(logits.argmax()))
            if self.ends(generated[-1]) or len(generated) >= limit:
                return generated
            logits = self.decode(generated[-1:], len(prompt) + len(generated) - 1)[-1]


def _work(request: dict[str, Any]) -> dict[str, Any]:
    sequences, prompts, limit = request["sequences"], request["prompts"], request["limit"]
    if sequences or prompts:
        longest = max([len(s) for s in sequences] + [len(p) + limit for p in prompts] + [_BATCH])
        vocabulary = model = _Model(request["model"], longest + 8, request["adapter"])
    else:
        vocabulary, model = _Vocabulary(request["model"], weights=False), None
    generated = [] if model is None else _run(model, sequences, prompts, limit, Path(request["folder"]))
    strings = [vocabulary.tokenise(text, control=False) for text in request["strings"]]
    eos = int(vocabulary.api.llama_vocab_eos(vocabulary.vocabulary))
    return asdict(
        Answer(
            strings=strings,
            restored=[vocabulary.text(ids) for ids in strings],
            segments=[
                [token for kind, text in parts for token in vocabulary.tokenise(text, control=kind == "control")]
                for parts in request["segments"]
            ],
            generated=generated,
            texts=[vocabulary.text(ids) for ids in generated],
            ended=[vocabulary.ends(ids[-1]) for ids in generated],
            eos=eos,
            eog=vocabulary.ends(eos),
            vocabulary=vocabulary.size,
        )
    )


def _run(
    model: _Model, sequences: list[list[int]], prompts: list[list[int]], limit: int, folder: Path
) -> list[list[int]]:
    blocks = [(n, start) for n, ids in enumerate(sequences) for start in range(0, len(ids), _BATCH)]
    total = len(blocks) + len(prompts)
    for done, (number, start) in enumerate(blocks, 1):
        if start == 0:
            model.forget()
        logits = model.decode(sequences[number][start : start + _BATCH], start)
        _wait_for(folder / f"block-{done - _AHEAD}.npy")
        np.save(folder / f"block-{done}.npy", logits)
        child.say(progress=[done, total, number, start])
    generated = []
    for done, prompt in enumerate(prompts, len(blocks) + 1):
        generated.append(model.greedy(prompt, limit))
        child.say(progress=[done, total])
    return generated


def _wait_for(block: Path) -> None:
    """Until the parent has taken a block; the child ends by itself when the parent dies (child.py)."""
    while block.exists():
        time.sleep(0.002)


if __name__ == "__main__":
    child.child_main(_work)
