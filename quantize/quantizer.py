"""K- and IQ-quants by llama.cpp's own quantizer, so that the type mixtures are upstream's.

Run as `python -m quantize.quantizer REQUEST.json` in a child process (see child.py): it cannot be cancelled and may
end the process. The importance matrix goes to the child as a .npz beside the request.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind

from quantize import child, header
from quantize.errors import BadInput
from quantize.sizes import EXEMPT, MIXTURES, NEED_IMATRIX, mixture, override_types
from quantize.writer import available_cores

FILE_TYPES = {quant: file_type for quant, (file_type, _) in MIXTURES.items()}
_TENSOR = re.compile(r"\[\s*\d+\s*/\s*\d+\s*\]\s+(\S+) +- ")
_SIZE = re.compile(r"size = .*?(?:\((\w+)\))?\s*$")
_BUFFER_BYTES = 64 << 20  # rows that are decoded and encoded at a time; llama.cpp's default is 8 GiB
_TEXT_BYTES = 127  # of a metadata override


def quantize(
    source: Path,
    target: Path,
    quant: str,
    folder: Path,
    progress: Callable[[int, int], None],
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    overrides: Mapping[str, str] | None = None,
    recorded: Mapping[str, str | int] | None = None,
    threads: int | None = None,
) -> None:
    """Writes `target` (a type in `FILE_TYPES`) from the float file `source`; `progress(done, total)` in bytes read.

    Parameters:
        folder: where the child's request lies while it runs.
        imatrix: importance.for_tensors: GGUF tensor → float32 [columns].
        overrides: {regular expression of tensor names: type}, the first that matches holds.
        recorded: what is added to the metadata (importance.Importance.record).
        threads: default one per core.

    Raises BadInput before anything is written for settings that cannot work, later with llama.cpp's reason.
    """
    request = _request(_read(source), quant, imatrix or {}, overrides or {}, recorded or {}, threads)
    try:
        _run({**request, "target": str(target)}, imatrix or {}, folder, progress)
    except child.ChildFailed as error:
        target.unlink(missing_ok=True)
        # What C++ says of every failed write.
        if "iostream error" in str(error):
            raise BadInput(
                f"The disk of {target.parent} is full; free some space or choose another --output."
            ) from error
        raise BadInput(f"Quantizing to {quant} failed; {error}. Free disk space or choose another --quant.") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def dry_run(
    source: Path,
    quant: str,
    folder: Path,
    *,
    imatrix: Mapping[str, np.ndarray] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Kind]:
    """The type that llama.cpp would give each tensor of `source`, from its own dry run. Raises BadInput."""
    head = _read(source)
    request = _request(head, quant, imatrix or {}, overrides or {}, {}, None)
    try:
        answer = _run({**request, "target": None}, imatrix or {}, folder, lambda _done, _total: None)
    except child.ChildFailed as error:
        raise BadInput(f"llama.cpp cannot quantize {source.name} to {quant}; {error}.") from error
    made = {name: Kind[kind.upper()] for name, kind in answer["kinds"].items()}
    return {name: made.get(name, tensor.kind) for name, tensor in head.tensors.items()}


def _read(source: Path) -> header.Header:
    try:
        return header.read(source)
    except header.Malformed as error:
        raise BadInput(f"{source.name} cannot be quantized: {error}.") from error


def _request(
    head: header.Header,
    quant: str,
    imatrix: Mapping[str, np.ndarray],
    overrides: Mapping[str, str],
    recorded: Mapping[str, str | int],
    threads: int | None,
) -> dict[str, Any]:
    shapes = {name: tensor.shape for name, tensor in head.tensors.items()}
    forced = override_types(shapes, overrides)
    _check_imatrix(head, quant, imatrix, overrides)
    for key, value in recorded.items():
        if isinstance(value, str) and len(value.encode()) > _TEXT_BYTES:
            raise ValueError(f"{key} is longer than {_TEXT_BYTES} bytes, which a metadata override cannot hold")
    return {
        "source": str(head.path),
        "sizes": {name: tensor.nbytes for name, tensor in head.tensors.items()},
        "file_type": FILE_TYPES[quant],
        # By exact name, so that Python's and C++'s regular expressions need not agree.
        "overrides": {f"^{re.escape(name)}$": int(kind) for name, kind in forced.items()},
        "recorded": dict(recorded),
        "threads": threads or available_cores(),
    }


def _check_imatrix(
    head: header.Header, quant: str, imatrix: Mapping[str, np.ndarray], overrides: Mapping[str, str]
) -> None:
    shapes = {name: tensor.shape for name, tensor in head.tensors.items()}
    for name, weights in imatrix.items():
        if name not in shapes or weights.shape != shapes[name][-1:]:
            raise BadInput(f"The importance matrix does not fit the model: {name} {weights.shape}; collect it again.")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise BadInput(f"The importance of {name} holds values that cannot be; collect the matrix again.")
    for name, kind in mixture(shapes, head.architecture, head.metadata, quant, bool(imatrix), overrides).items():
        if kind in NEED_IMATRIX and name not in imatrix and name not in EXEMPT:
            raise BadInput(
                f"{quant} needs an importance matrix ({name} becomes {kind.name} and has none); "
                "make one with --imatrix auto, or choose Q3_K_M."
            )


def _run(
    request: dict[str, Any],
    imatrix: Mapping[str, np.ndarray],
    folder: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    file = folder / "imatrix.npz"
    try:
        if imatrix:
            arrays: dict[str, Any] = {name: np.asarray(weights, np.float32) for name, weights in imatrix.items()}
            np.savez(file, **arrays)
            request["imatrix"] = str(file)
        return child.run("quantize.quantizer", request, folder, progress)
    finally:
        file.unlink(missing_ok=True)


class _Heard:
    """llama.cpp's log, which arrives in pieces of lines: what is being made, how far it is, and what went wrong."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.kinds: dict[str, str] = {}
        self._sizes, self._total, self._done = sizes, sum(sizes.values()), 0
        self._name = ""

    def __call__(self, text: str) -> None:
        if match := _TENSOR.search(text):
            self._name = match[1]
        elif match := _SIZE.match(text):
            if match[1]:  # said by a dry run
                self.kinds[self._name] = match[1]
            self._done += self._sizes.get(self._name, 0)
            child.say(progress=[self._done, self._total])
        elif text.strip(" .\n=") and not text.startswith("converting to"):
            child.say(log=text.strip())


def _work(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    heard = _Heard(request["sizes"])
    log = child.redirect_log(llama_cpp, heard)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = request["file_type"]
    parameters.nthread = request["threads"]
    parameters.max_buf_size = _BUFFER_BYTES
    parameters.dry_run = request["target"] is None
    kept = [_imatrix(llama_cpp, parameters, request.get("imatrix"))]
    kept.append(_overrides(llama_cpp, parameters, request["overrides"]))
    kept.append(_recorded(llama_cpp, parameters, request["recorded"]))
    target = (request["target"] or os.devnull).encode()
    code = llama_cpp.llama_model_quantize(request["source"].encode(), target, ctypes.pointer(parameters))
    del log, kept
    if code != 0:
        raise SystemExit(3)
    return {"kinds": heard.kinds}


# Each of the three lists ends with an entry of zeros; llama.cpp reads them only while it works, so what is
# returned must live as long.
def _imatrix(llama_cpp: Any, parameters: Any, file: str | None) -> Any:
    if file is None:
        return None
    with np.load(file) as loaded:
        arrays = {name: np.ascontiguousarray(loaded[name], np.float32) for name in loaded}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, weights) in zip(entries, arrays.items(), strict=False):
        entry.name, entry.size = name.encode(), weights.size
        entry.data = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    return entries, arrays


def _overrides(llama_cpp: Any, parameters: Any, overrides: dict[str, int]) -> Any:
    if not overrides:
        return None
    entries = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
    for entry, (pattern, kind) in zip(entries, overrides.items(), strict=False):
        entry.pattern, entry.type = pattern.encode(), kind
    parameters.tt_overrides = ctypes.cast(entries, type(parameters.tt_overrides))
    return entries


def _recorded(llama_cpp: Any, parameters: Any, recorded: dict[str, str | int]) -> Any:
    if not recorded:
        return None
    entries = (llama_cpp.llama_model_kv_override * (len(recorded) + 1))()
    for entry, (key, value) in zip(entries, recorded.items(), strict=False):
        entry.key = key.encode()
        if isinstance(value, str):
            entry.tag, entry.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            entry.tag, entry.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, value
    parameters.kv_overrides = ctypes.cast(entries, type(parameters.kv_overrides))
    return entries


if __name__ == "__main__":
    child.child_main(_work)
