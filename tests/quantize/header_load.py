"""Loads and runs GGUF files with llama.cpp, one after the other, naming each first. Run in a child by test_header.py.

`python header_load.py FOLDER`: prints every file's name before it is touched, so that the last name printed by a
process that was aborted is the file's that did it. The last line holds how many files loaded and how many ran.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp

TEXTS = ("", "ab 儿科 39.5℃\n\t👶", "<|im_end|>a<s>\0b")


def main(folder: Path) -> None:
    silent = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    loaded = ran = 0
    for path in sorted(folder.glob("*.gguf")):
        print(path.name, flush=True)
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if model:
            use_vocabulary(model)
            llama_cpp.llama_model_free(model)
            loaded += 1
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if model:
            ran += run(model)
            llama_cpp.llama_model_free(model)
    print(json.dumps({"loaded": loaded, "ran": ran}))


def use_vocabulary(model: Any) -> None:
    vocabulary: Any = llama_cpp.llama_model_get_vocab(model)
    tokens = (llama_cpp.llama_token * 256)()
    piece = ctypes.create_string_buffer(512)
    for text in TEXTS:
        for special in (False, True):
            data = text.encode()
            llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, 256, special, special)
    for token in range(min(llama_cpp.llama_vocab_n_tokens(vocabulary), 300)):
        llama_cpp.llama_token_to_piece(vocabulary, token, piece, 512, 0, True)
        llama_cpp.llama_vocab_is_eog(vocabulary, token)


def run(model: Any) -> bool:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_threads, parameters.n_threads_batch = 64, 8, 1, 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        return False
    tokens = (llama_cpp.llama_token * 3)(0, 1, 2)
    good = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 3)) == 0
    llama_cpp.llama_free(context)
    return good


if __name__ == "__main__":
    main(Path(sys.argv[1]))
