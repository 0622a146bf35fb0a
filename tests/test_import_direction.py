"""The corridor is one-way: tui imports neither trainer nor quantize, trainer imports neither of the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
ALLOWED = {"tui": {"tui"}, "trainer": {"trainer"}, "quantize": {"quantize", "trainer"}}
ROOMS = set(ALLOWED)


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_room_imports_only_what_it_may(room: str) -> None:
    files = list((PROJECT / room).rglob("*.py"))
    assert files
    for path in files:
        rooms = {name.split(".")[0] for name in _imports(path)} & ROOMS
        assert rooms <= ALLOWED[room], f"{path.relative_to(PROJECT)} imports {rooms - ALLOWED[room]}"


def test_quantize_uses_only_the_trainers_mue_recipe_and_prompts() -> None:
    used = {n for path in (PROJECT / "quantize").rglob("*.py") for n in _imports(path) if n.startswith("trainer")}
    allowed = ("trainer.mue", "trainer.recipe", "trainer.prompts")
    assert all(name.startswith(allowed) or name == "trainer" for name in used), used
    assert used


def test_front_door_and_shell_commands_start_without_heavy_imports() -> None:
    code = (
        "import sys, pediatricsgpt, tui.cli\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'textual', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported at start: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
