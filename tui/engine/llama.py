"""A thin layer over llama.cpp's C API (through llama-cpp-python's bindings): one model, one sequence.

Only the child process imports this. The high-level `llama_cpp.Llama` class is not used: it freezes streams on an
invalid byte, loses long pieces and cannot be stopped while it reads a prompt.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np

from tui.engine.contract import EngineError
from tui.engine.header import Header

BATCH, MICRO_BATCH = 256, 128  # tokens per decode call / per graph; small graphs make stopping quick
_CONTROL = 3  # token type in the GGUF


class Stopped(Exception):
    """Evaluation was aborted because a stop was requested."""


class StopFlag:
    """A flag that llama.cpp reads itself at every node of its graph, without calling Python.

    libc's `strlen` serves as the abort callback: on a buffer that holds "" it returns 0 (go on), on "x" it returns 1
    (abort). A Python callback would cost about a microsecond, and the GIL, per node.
    """

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(2)
        library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        self.callback = ctypes.cast(library.strlen, C.ggml_abort_callback)
        self.address = ctypes.cast(self._buffer, ctypes.c_void_p)

    def set(self, stop: bool) -> None:
        """Request (or withdraw) a stop; safe from any thread."""
        self._buffer[0] = b"x" if stop else b"\0"

    def __bool__(self) -> bool:
        return self._buffer[0] != b"\0"


_refusals: list[str] = []  # why llama.cpp did not load a model; it says so in its log alone
_REFUSAL = re.compile(r"error loading model:\s*(.+)")


@C.llama_log_callback
def _log_to_stderr(_level: int, text: bytes, _data: Any) -> None:
    # The parent keeps the last lines; the default callback would print to the terminal.
    os.write(2, text)
    if found := _REFUSAL.search(text.decode("utf-8", "replace")):
        _refusals.append(found[1].strip())


class Model:
    """A loaded model with its KV cache; `kept` are the tokens the cache holds, in order."""

    def __init__(self, header: Header, context: int, threads: int, flag: StopFlag) -> None:
        """Load; raises EngineError when llama.cpp refuses the file."""
        C.llama_log_set(_log_to_stderr, ctypes.c_void_p(0))
        C.llama_backend_init()
        self.flag = flag
        self.decode_calls = 0
        self.kept: list[int] = []
        # The handles are plain pointers; the bindings' own types tell nothing more.
        self._model: Any = C.llama_model_load_from_file(os.fsencode(header.path), C.llama_model_default_params())
        if not self._model:
            reason = _refusals[-1] if _refusals else "文件可能已损坏"
            raise EngineError(
                f"llama.cpp 不能加载 {header.path.name}（架构 {header.architecture}：{reason[:200]}），"
                "请更新本程序、重新下载，或换一个模型。"
            )
        if C.llama_model_has_encoder(self._model) or not C.llama_model_has_decoder(self._model):
            raise EngineError(f"{header.path.name}（架构 {header.architecture}）不是逐字生成的对话模型，请换一个模型。")
        parameters = C.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch, parameters.n_ubatch = BATCH, MICRO_BATCH
        parameters.n_outputs_max = 1  # logits of the last row only: 6 MiB of buffer instead of 298
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.no_perf = True
        self._context: Any = C.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise EngineError(f"内存不够，无法为 {header.path.name} 分配上下文，请关闭其他程序或换一个更小的模型。")
        C.llama_set_abort_callback(self._context, flag.callback, flag.address)
        self._memory: Any = C.llama_get_memory(self._context)
        self._vocabulary: Any = C.llama_model_get_vocab(self._model)
        self.context = min(context, int(C.llama_n_ctx(self._context)))
        self.parameters = int(C.llama_model_n_params(self._model))
        self._size = int(C.llama_vocab_n_tokens(self._vocabulary))
        self.controls = self._control_tokens(header.metadata)
        self.named = _named_tokens(header.metadata)
        self._piece_buffer = ctypes.create_string_buffer(256)
        self._batch = (C.llama_token * BATCH)()

    @property
    def begin(self) -> int | None:
        """The id every prompt begins with, None when the vocabulary has none."""
        adds = C.llama_vocab_get_add_bos(self._vocabulary)
        return int(C.llama_vocab_bos(self._vocabulary)) if adds else None

    @property
    def end(self) -> int:
        """The id that ends an answer: end of turn where the vocabulary has one, else end of text."""
        turn = int(C.llama_vocab_eot(self._vocabulary))
        return turn if turn >= 0 else int(C.llama_vocab_eos(self._vocabulary))

    def ends(self, token: int) -> bool:
        """Whether a token ends generation."""
        return bool(C.llama_vocab_is_eog(self._vocabulary, token))

    def tokenise(self, text: str) -> list[int]:
        """Ids of plain text: control tokens in it are not recognised, nothing is added."""
        if not text:
            return []
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 2
        ids = (C.llama_token * room)()
        count = C.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, False, False)
        if count < 0:
            raise EngineError("llama.cpp 不能切分这段文字，请缩短问题。")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of a token; control tokens have none."""
        size = C.llama_token_to_piece(self._vocabulary, token, self._piece_buffer, len(self._piece_buffer), 0, False)
        if size < 0:  # longer than the buffer: minus the size needed
            self._piece_buffer = ctypes.create_string_buffer(-size)
            return self.piece(token)
        return self._piece_buffer.raw[:size]

    def rewind(self, tokens: Sequence[int]) -> int:
        """Keep the longest common prefix of cache and tokens; returns its length.

        At least one token is left to evaluate, because the cache holds no logits.
        """
        common = 0
        for old, new in zip(self.kept, tokens[:-1], strict=False):
            if old != new:
                break
            common += 1
        del self.kept[common:]
        self._drop_rest()
        return len(self.kept)

    def extend(self, tokens: Sequence[int], progress: Callable[[int], None] | None = None) -> None:
        """Evaluate tokens after what is kept; `progress` gets the count done after each batch.

        Raises Stopped when the flag is set meanwhile, EngineError when llama.cpp fails.
        """
        for start in range(0, len(tokens), BATCH):
            if self.flag:
                raise Stopped
            part = tokens[start : start + BATCH]
            self._batch[: len(part)] = part  # type: ignore[assignment]
            self.decode_calls += 1
            code = C.llama_decode(self._context, C.llama_batch_get_one(self._batch, len(part)))
            if code:
                self._resume(part)
                if code == 2:
                    raise Stopped
                raise EngineError(f"llama.cpp 计算失败（{code}），请重新提问；若反复出现请换一个模型。")
            self.kept += part
            if progress:
                progress(start + len(part))

    def _resume(self, part: Sequence[int]) -> None:
        """After an aborted batch: keep the tokens that whole micro batches have evaluated."""
        done = int(C.llama_memory_seq_pos_max(self._memory, 0)) + 1
        self.kept += part[: max(0, done - len(self.kept))]
        self._drop_rest()

    def _drop_rest(self) -> None:
        """Remove from the cache what is not kept; a recurrent model cannot go back and keeps nothing."""
        if not C.llama_memory_seq_rm(self._memory, 0, len(self.kept), -1):
            C.llama_memory_seq_rm(self._memory, 0, -1, -1)
            self.kept.clear()

    def logits(self) -> np.ndarray:
        """Logits [vocabulary] after the last token; a view, valid until the next `extend`."""
        return np.ctypeslib.as_array(C.llama_get_logits_ith(self._context, -1), shape=(self._size,))

    def sampler(self, sampling: Mapping[str, float], seed: int | None = None) -> Callable[[], int]:
        """A function that picks the next token: greedy when `sampling` is empty, else top_k, top_p, temperature."""
        if not sampling or sampling.get("temp", 1.0) <= 0:
            return lambda: int(np.argmax(self.logits()))
        chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        # top_k first: what follows then looks at 20 tokens instead of the whole vocabulary
        for stage in (
            C.llama_sampler_init_top_k(int(sampling["top_k"])),
            C.llama_sampler_init_top_p(float(sampling["top_p"]), 1),
            C.llama_sampler_init_temp(float(sampling["temp"])),
            C.llama_sampler_init_dist(C.LLAMA_DEFAULT_SEED if seed is None else seed),
        ):
            C.llama_sampler_chain_add(chain, stage)
        return _Sampler(chain, self._context)

    def _control_tokens(self, metadata: Mapping[str, Any]) -> dict[str, int]:
        """Text -> id of the control tokens; llama.cpp also makes ends of turn out of mistyped ones."""
        texts = metadata["tokenizer.ggml.tokens"]
        types = metadata.get("tokenizer.ggml.token_type") or [1] * len(texts)
        ids = {number for number, kind in enumerate(types) if kind == _CONTROL}
        ids |= {self.end, int(C.llama_vocab_eos(self._vocabulary))}
        return {texts[i]: i for i in sorted(ids) if i >= 0 and C.llama_vocab_is_control(self._vocabulary, i)}


def _named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The texts that templates know as bos_token and so on; those the file does not name are missing."""
    texts = metadata["tokenizer.ggml.tokens"]
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: texts[number] for name, number in found.items() if number is not None and number >= 0}


class _Sampler:
    """A sampler chain bound to a context; freed with the object."""

    def __init__(self, chain: Any, context: Any) -> None:
        self._chain, self._context = chain, context

    def __call__(self) -> int:
        return int(C.llama_sampler_sample(self._chain, self._context, -1))

    def __del__(self) -> None:
        C.llama_sampler_free(self._chain)


def default_threads() -> int:
    """Physical cores this process may use: a second hardware thread per core slows llama.cpp down."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pairs: set[str] = set()
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        pairs.add(path.read_text())
    return max(1, min(usable, len(pairs) or usable))
