"""K- and IQ-quants by llama.cpp's own quantizer, so that the type mixtures are upstream's.

Run as `python -m quantize.quantizer REQUEST.json` in a child process (see child.py).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantize import child
from quantize.errors import BadInput

# llama.cpp's file types (enum llama_ftype), the ones offered.
FILE_TYPES = {"Q4_0": 2, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_XS": 30}
_PROGRESS = re.compile(r"\[\s*(\d+)\s*/\s*(\d+)\s*\]")
_BUFFER_BYTES = 256 << 20  # llama.cpp's default is 8 GiB


def quantize(source: Path, target: Path, quant: str, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Writes `target` (type `quant`) from the float file `source`. Raises BadInput with llama.cpp's reason."""
    request = {"source": str(source), "target": str(target), "file_type": FILE_TYPES[quant]}
    try:
        child.run("quantize.quantizer", request, folder, progress)
    except child.ChildFailed as error:
        target.unlink(missing_ok=True)
        raise BadInput(f"Quantizing to {quant} failed; {error}. Free disk space or choose another --quant.") from error


def _work(request: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    def heard(text: str) -> None:
        if match := _PROGRESS.search(text):
            child.say(progress=[int(match[1]), int(match[2])])
        elif text.strip(" .\n"):
            child.say(log=text.strip())

    log = child.redirect_log(llama_cpp, heard)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = request["file_type"]
    parameters.nthread = 0
    parameters.max_buf_size = _BUFFER_BYTES
    code = llama_cpp.llama_model_quantize(
        request["source"].encode(), request["target"].encode(), ctypes.pointer(parameters)
    )
    del log
    if code != 0:
        raise SystemExit(3)
    return {}


if __name__ == "__main__":
    child.child_main(_work)
