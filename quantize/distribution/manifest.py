"""manifest.json and SHA256SUMS: what a distribution holds, written and read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantize.errors import BadInput
from quantize.run_folder import file_sha256

MANIFEST, SUMS, REPORT, CARD, MODELFILE = "manifest.json", "SHA256SUMS", "fidelity.json", "README.md", "Modelfile"
DOCUMENTS = (CARD, MODELFILE, REPORT, MANIFEST, SUMS)
# What a manifest may name: nothing absolute, hidden, or outside the folder, on any system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_PACKAGES = ("pediatricsgpt", "torch", "transformers", "peft", "gguf", "llama-cpp-python", "numpy")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Readable, deterministic JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_sums(path: Path, sums: Mapping[str, str]) -> None:
    """A file that `sha256sum -c` reads."""
    path.write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8", newline="\n")


def versions() -> dict[str, str]:
    """Versions of the packages an export depends on, as far as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # the project itself, when it runs from its folder
    return found


@dataclass(frozen=True)
class Distribution:
    """What manifest.json and SHA256SUMS say together; no other file was looked at."""

    manifest: dict[str, Any]
    sums: dict[str, str]

    @classmethod
    def parse(cls, manifest: bytes, sums: bytes, where: str) -> Distribution:
        """Checks the two files against each other. Raises BadInput naming `where` they are from."""
        found = parse_sums(sums, where)
        if found.pop(MANIFEST, None) != _sha256(manifest):
            raise BadInput(f"{where}: {MANIFEST} is not the one that {SUMS} names; get the folder again.")
        try:
            value = json.loads(manifest)
            outputs = {
                _checked(name, where): (str(o["sha256"]), int(o["bytes"])) for name, o in value["outputs"].items()
            }
            str(value["name"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{where}: {MANIFEST} is damaged ({error!r}); get or make the folder again.") from error
        for name, digest in found.items():
            if outputs.get(name, ("", 0))[0] != digest:
                raise BadInput(f"{where}: {SUMS} and {MANIFEST} disagree about {name}; get or make the folder again.")
        return cls(value, found | {MANIFEST: _sha256(manifest)})

    @classmethod
    def open(cls, folder: Path) -> Distribution:
        """Reads a folder's two files. Raises BadInput."""
        try:
            return cls.parse((folder / MANIFEST).read_bytes(), (folder / SUMS).read_bytes(), str(folder))
        except FileNotFoundError as error:
            raise BadInput(
                f"{folder} is no distribution folder, {Path(error.filename).name} is missing; "
                "`pediatricsgpt quantize RUN` makes one under dist/."
            ) from error
        except OSError as error:
            raise BadInput(f"{folder} cannot be read ({error}); check the folder and its rights.") from error

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.manifest["name"])

    @property
    def models(self) -> dict[str, str]:
        """Quant → file of every model the manifest names, whether SHA256SUMS covers it or not."""
        files = [n for n in self.manifest["outputs"] if n.endswith(".gguf") and "/" not in n]
        return {n.removeprefix(f"{self.name}-").removesuffix(".gguf"): n for n in files}

    @property
    def adapters(self) -> dict[str, str]:
        """Task → file of every task adapter."""
        files = [n for n in self.manifest["outputs"] if n.startswith("adapters/") and n.endswith(".gguf")]
        return {Path(n).stem: n for n in files}

    def size(self, name: str) -> int:
        """Bytes of a file that the manifest names."""
        return int(self.manifest["outputs"][name]["bytes"])

    def verify(self, folder: Path, progress: Callable[[str, int, int], None]) -> None:
        """Reads every file that SHA256SUMS names. Raises BadInput naming the first that is wrong."""
        for number, (name, digest) in enumerate(sorted(self.sums.items())):
            progress("Verifying checksums", number, len(self.sums))
            file = folder / name
            if not file.is_file():
                raise BadInput(f"{file} is missing, though {SUMS} names it; get or make the folder again.")
            if file_sha256(file) != digest:
                raise BadInput(f"{file} is not what {SUMS} says: it was changed or damaged; get or make it again.")
        progress("Verifying checksums", len(self.sums), len(self.sums))


def parse_sums(data: bytes, where: str) -> dict[str, str]:
    """File name → sha256. Raises BadInput for a line that is none, or names a place outside the folder."""
    sums = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if not match:
            raise BadInput(f"{where}: line {number} of {SUMS} is damaged; get or make the folder again.")
        sums[_checked(match[2], where)] = match[1]
    return sums


def is_name(name: str) -> bool:
    """Whether a distribution may hold a file of this name."""
    return _NAME.fullmatch(name) is not None


def _checked(name: str, where: str) -> str:
    if not is_name(name):
        raise BadInput(f"{where} names the file {name!r}, which is no place inside a distribution; do not use it.")
    return name


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
