"""A GGUF opened by llama.cpp itself: token ids, logits, end of generation.

Run as `python -m quantize.probe REQUEST.json` in a child process (see child.py), because llama.cpp aborts
the process on a malformed file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quantize import child

_SMALL_BYTES = 64 << 20  # below, one thread is faster: several would mostly wait for each other
_BATCH = 128  # positions per decode; bounds the logits buffer to 128 rows


def probe(
    model: Path,
    *,
    strings: list[str],
    segments: list[list[list[str]]],
    sequences: list[list[int]],
    prompts: list[list[int]],
    limit: int,
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """What llama.cpp makes of a file.

    strings: texts to tokenise as plain text. segments: per conversation ["plain" | "control", text] pairs.
    sequences: token ids whose logits at every position go to `folder`/logits-N.npy, float32 [tokens, vocabulary].
    prompts: token ids to continue greedily until an end-of-generation token or `limit` tokens.
    Returns `strings`, `segments`, `generated` (ids, the end token included), `eos`, `eog`, `threads`.
    Raises child.ChildFailed.
    """
    request = {
        "model": str(model),
        "strings": strings,
        "segments": segments,
        "sequences": sequences,
        "prompts": prompts,
        "limit": limit,
        "folder": str(folder),
    }
    return child.run("quantize.probe", request, folder, progress)


class _Model:
    """A model with one context whose cache is float32, so that only the weights' precision is compared."""

    def __init__(self, path: str, context: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._log = child.redirect_log(
            llama_cpp, lambda text: child.say(log=text.strip()) if text.strip(" .\n") else None
        )
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(3)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = _BATCH
        threads = 1 if os.path.getsize(path) < _SMALL_BYTES else os.cpu_count() or 1
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
        parameters.flash_attn_type = 0  # disabled: its accumulation differs from the reference's
        self.context: Any = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit(3)
        self.vocabulary: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.size: int = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def tokenise(self, text: str, *, control: bool) -> list[int]:
        data = text.encode()
        tokens = (self.api.llama_token * (len(data) + 8))()
        count = self.api.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), False, control)
        return list(tokens[:count])

    def forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, tokens: list[int], position: int) -> np.ndarray:
        """Logits [len(tokens), vocabulary] of tokens that follow `position` cached ones."""
        blocks = []
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            self._batch.n_tokens = len(part)
            for index, token in enumerate(part):
                self._batch.token[index] = token
                self._batch.pos[index] = position + start + index
                self._batch.n_seq_id[index] = 1
                self._batch.seq_id[index][0] = 0
                self._batch.logits[index] = 1
            if self.api.llama_decode(self.context, self._batch) != 0:
                raise SystemExit(4)
            address = self.api.llama_get_logits(self.context)
            blocks.append(np.ctypeslib.as_array(address, shape=(len(part), self.size)).copy())
        return np.concatenate(blocks)

    def greedy(self, prompt: list[int], limit: int) -> list[int]:
        """Greedy continuation up to and including the first end-of-generation token."""
        self.forget()
        generated: list[int] = []
        logits = self.decode(prompt, 0)[-1]
        while True:
            generated.append(int(logits.argmax()))
            if self.api.llama_vocab_is_eog(self.vocabulary, generated[-1]) or len(generated) >= limit:
                return generated
            logits = self.decode(generated[-1:], len(prompt) + len(generated) - 1)[-1]


def _work(request: dict[str, Any]) -> dict[str, Any]:
    sequences, prompts = request["sequences"], request["prompts"]
    longest = max([len(s) for s in sequences] + [len(p) + request["limit"] for p in prompts] + [_BATCH])
    model = _Model(request["model"], longest + 8)
    total = len(sequences) + len(prompts)
    for number, sequence in enumerate(sequences):
        model.forget()
        np.save(Path(request["folder"]) / f"logits-{number}.npy", model.decode(sequence, 0))
        child.say(progress=[number + 1, total])
    generated = []
    for number, prompt in enumerate(prompts, 1):
        generated.append(model.greedy(prompt, request["limit"]))
        child.say(progress=[len(sequences) + number, total])
    eos = int(model.api.llama_vocab_eos(model.vocabulary))
    return {
        "strings": [model.tokenise(text, control=False) for text in request["strings"]],
        "segments": [
            [token for kind, text in parts for token in model.tokenise(text, control=kind == "control")]
            for parts in request["segments"]
        ],
        "generated": generated,
        "eos": eos,
        "eog": bool(model.api.llama_vocab_is_eog(model.vocabulary, eos)),
        "vocabulary": model.size,
    }


if __name__ == "__main__":
    child.child_main(_work)
