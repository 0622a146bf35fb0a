"""Makes a wheel from a distribution that is installed here, for tests that need one and no index."""

from __future__ import annotations

import zipfile
from importlib.metadata import distribution
from pathlib import Path


def repacked(name: str, folder: Path, tag: str = "py3-none-any") -> Path:
    """Writes NAME-VERSION-TAG.whl to `folder`: what RECORD names, except scripts and compiled files."""
    found = distribution(name)
    wheel = folder / f"{name.replace('-', '_')}-{found.version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for entry in found.files or ():
            if (
                ".." not in entry.parts
                and "__pycache__" not in entry.parts
                and entry.parts[0] not in ("lib", "include")
            ):
                archive.write(str(entry.locate()), str(entry))
    return wheel
