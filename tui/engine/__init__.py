"""The engine room: llama.cpp in a child process, behind a small JSON-lines protocol.

Importing this package imports neither llama_cpp nor numpy; only the child does.
"""

from pathlib import Path

from tui.engine.contract import EngineError

MODELS = Path(__file__).parent.parent / "models"


def embedded_model(folder: Path = MODELS) -> Path:
    """Return the GGUF that ships with the app; raises EngineError when none is installed."""
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise EngineError(f"没有找到内置模型（{folder} 中没有 .gguf 文件），请重新安装，或用 --model 指定一个模型。")
    return found[0]


__all__ = ["EngineError", "embedded_model"]
