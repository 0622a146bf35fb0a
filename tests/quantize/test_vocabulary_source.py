"""The script that fetches upstream's vocabularies: what it unpacks, and what it says when it cannot."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from llama_vocabulary import llama_source

ROOT = Path(__file__).parents[2]


def archive(folder: Path, members: dict[str, bytes | str]) -> Path:
    """A source package; a text as content makes a symbolic link to it."""
    file = folder / "package.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file


def test_only_wanted_files_are_unpacked(tmp_path: Path) -> None:
    top = "llama_cpp_python-1/vendor/llama.cpp/"
    file = archive(
        tmp_path,
        {
            f"{top}models/ggml-vocab-x.gguf": b"x",
            f"{top}models/ggml-vocab-x.gguf.inp": b"y",
            f"{top}conversion/qwen.py": b"z",
            f"{top}src/llama.cpp": b"not wanted",
            f"{top}models/templates/a.jinja": b"not wanted",
            f"{top}gguf-py/link": "/etc/passwd",
            "llama_cpp_python-1/pyproject.toml": b"not wanted",
        },
    )
    assert llama_source.unpack(file, tmp_path / "out") == 3
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"models/ggml-vocab-x.gguf", "models/ggml-vocab-x.gguf.inp", "conversion/qwen.py"}


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    name = "llama_cpp_python-1/vendor/llama.cpp/gguf-py/../../../../escaped"
    with pytest.raises(tarfile.FilterError):
        llama_source.unpack(archive(tmp_path, {name: b"x"}), tmp_path / "a" / "b")
    assert not list(tmp_path.rglob("escaped"))


def test_without_an_index_the_remedy_is_named_and_nothing_counts_as_fetched(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts/llama_source.py", tmp_path / "scripts")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    result = subprocess.run(
        [sys.executable, script], env={**os.environ, **nowhere}, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert "pip could not download llama-cpp-python" in result.stderr
    assert "PIP_FIND_LINKS=FOLDER" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("complete.txt"))


def test_a_package_of_another_version_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_source, "_FOLDER", tmp_path)
    assert llama_source.source_package() is None
    (tmp_path / "complete.txt").write_text("0.0.1")
    assert llama_source.source_package() is None
    (tmp_path / "complete.txt").write_text(llama_source.version())
    assert llama_source.source_package() == tmp_path
    assert llama_source.fetch() == tmp_path  # without pip
