"""What goes into a bundle: the app's wheels, a model, the installer, and bundle.json, which says so."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.bundle import installer, texts, wheels
from quantize.bundle.platforms import PLATFORMS, Platform
from quantize.bundle.portable import instruction_sets
from quantize.distribution.manifest import CARD, MANIFEST, REPORT, Distribution
from quantize.errors import BadInput
from quantize.header import Malformed
from quantize.header import read as read_header
from quantize.progress import Progress
from quantize.run_folder import file_sha256

FAT_FILE_LIMIT = 2**32 - 1
_FAT_FORBIDDEN = re.compile(r'[\x00-\x1f"*:<>?\\|]|[. ]$')
_FAT_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """What the command was asked for. `only`: "app", "model" or None for both; `cache`: where wheels are kept."""

    source: Path | None
    platform: str
    pythons: tuple[str, ...]
    cache: Path
    wheels: Path | None = None
    quant: str | None = None
    only: str | None = None
    native: bool = False
    large_files: bool = False


@dataclass(frozen=True)
class Item:
    """One file of the bundle: its name there, where it comes from (a file, or its content), sha256 and bytes."""

    name: str
    source: Path | bytes
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Contents:
    """The files in order, bundle.json's content without its list of files, and what the user should know."""

    items: tuple[Item, ...]
    facts: dict[str, Any]
    notes: tuple[str, ...]


def collect(options: Options, work: Path, progress: Progress) -> Contents:
    """Gathers everything; builds and downloads what is not in the cache yet. `work` is a scratch folder.

    Raises BadInput when something is missing, damaged, or does not fit on a FAT32 stick.
    """
    platform = PLATFORMS[options.platform]
    parts = [options.only] if options.only else ["app", "model"]
    items: list[Item] = []
    notes: list[str] = []
    facts: dict[str, Any] = {
        "format": installer.FORMAT, "parts": parts, "platform": platform.name, "python": [], "app": None, "model": None,
        "requires": {"cpu": [], "glibc": None, "libraries": []}, "unpacked_bytes": 0,
    }  # fmt: skip
    # The model first: reading it is quick to fail, building llama.cpp is not.
    if "model" in parts:
        found, facts["model"] = _model(options, progress)
        items += found
    if "app" in parts:
        files, told = _app(options, platform, work, facts, progress)
        items += [item(f"wheels/{path.name}", path) for path in files]
        notes += told
    room = sum(i.bytes for i in items) + facts["unpacked_bytes"]
    items += [item(name, data) for name, data in texts.installer_files(facts, room).items()]
    items.sort(key=lambda i: i.name)
    refuse_names([*((i.name, i.bytes) for i in items), ("bundle.json", 0), ("SHA256SUMS", 0)], options.large_files)
    return Contents(tuple(items), facts, tuple(notes))


def item(name: str, source: Path | bytes, sha256: str | None = None) -> Item:
    """An item; a file is read once for its sha256 unless that is known."""
    if isinstance(source, bytes):
        return Item(name, source, hashlib.sha256(source).hexdigest(), len(source))
    return Item(name, source, sha256 or file_sha256(source), source.stat().st_size)


def refuse_names(files: Iterable[tuple[str, int]], large_files: bool = False) -> None:
    """Raises BadInput for what a FAT32 stick cannot hold: (name, bytes) with too large a size or a forbidden name."""
    seen: dict[str, str] = {}
    for name, size in files:
        for part in name.split("/"):
            if _FAT_FORBIDDEN.search(part) or _FAT_RESERVED.fullmatch(part) or len(part.encode("utf-16-le")) > 510:
                raise BadInput(f"A USB stick (FAT) cannot hold a file named {name!r}; rename it.")
        if other := seen.get(name.lower()):
            raise BadInput(f"{other} and {name} are the same name on a USB stick (FAT); rename one.")
        seen[name.lower()] = name
        if size > FAT_FILE_LIMIT and not large_files:
            raise BadInput(
                f"{name} has {size / 2**30:.2f} GiB; a FAT32 stick holds files below 4 GiB. Choose a smaller --quant, "
                "or format the stick as exFAT and add --large-files."
            )


def _model(options: Options, progress: Progress) -> tuple[list[Item], dict[str, Any]]:
    source = options.source
    if source is None:
        raise BadInput("Name the model: a distribution folder (dist/NAME) or a .gguf file; or use --only app.")
    if source.is_dir():
        distribution = Distribution.open(source)
        file = _chosen(distribution, options.quant)
        distribution.verify(source, progress)
        names = [file, *distribution.adapters.values(), MANIFEST, REPORT, CARD]
        digests = distribution.sums
        name = distribution.name
    elif source.is_file():
        names, digests, file, name = [source.name], {}, source.name, source.stem
        source = source.parent
    else:
        raise BadInput(f"There is no {source}; give a distribution folder (dist/NAME) or a .gguf file.")
    try:
        header = read_header(source / file)
    except Malformed as error:
        raise BadInput(f"{source / file} is no usable GGUF file ({error}); make it again.") from error
    progress("reading the model", 0, 1)
    items = [item(f"model/{n}", source / n, digests.get(n)) for n in names if (source / n).is_file()]
    progress("reading the model", 1, 1)
    facts = {
        "name": name,
        "file": file,
        "architecture": header.metadata.get("general.architecture"),
        "demonstration": bool(header.metadata.get("pediatricsgpt.demonstration", False)),
    }
    return items, facts


def _chosen(distribution: Distribution, quant: str | None) -> str:
    models = {name: file for name, file in distribution.models.items() if file in distribution.sums}
    if quant in models:
        return models[quant]
    if quant is None and len(models) == 1:
        return next(iter(models.values()))
    sizes = ", ".join(f"{name} ({distribution.size(file) / 2**20:.0f} MiB)" for name, file in models.items())
    raise BadInput(f"{distribution.name} holds {sizes or 'no model'}; choose one with --quant TYPE.")


def _app(
    options: Options, platform: Platform, work: Path, facts: dict[str, Any], progress: Progress
) -> tuple[list[Path], list[str]]:
    """The wheels; fills in `facts`. Returns notes, too."""
    commit, changed = wheels.git_state()
    facts["app"] = {"version": wheels.project_version(), "git_commit": commit, "git_changed": changed}
    facts["python"] = list(options.pythons)
    notes = []
    if changed:
        notes.append("The app was packed with changes that are not committed.")
    here = platform.name == installer.machine()
    llama = wheels.llama_wheel(platform, options.wheels, options.cache, here, progress)
    cpu = set(platform.cpu)
    if here:
        cpu = _refuse_native(llama, platform, options.native)
    else:
        notes.append(f"{llama.name} is for another platform; its instruction sets could not be inspected here.")
    progress("building the app's wheel", 0, 1)
    app = wheels.app_wheel(work)
    progress("building the app's wheel", 1, 1)
    roots = [wheels.Wheel.read(app), wheels.Wheel.read(llama)]
    progress("fetching dependencies", 0, 1)
    others = wheels.dependencies(platform, options.pythons, roots, options.wheels, options.cache)
    progress("fetching dependencies", 1, 1)
    files = [app, llama, *others]
    glibc, libraries = wheels.system_needs(files) if platform.name.startswith("linux-") else (None, [])
    facts["requires"] = {"cpu": sorted(cpu), "glibc": glibc, "libraries": libraries}
    facts["unpacked_bytes"] = wheels.unpacked_bytes(files)
    return files, notes


def _refuse_native(llama: Path, platform: Platform, native: bool) -> set[str]:
    """What the wheel was really compiled for; raises BadInput when that is more than the platform's baseline."""
    found = instruction_sets(llama)
    if (beyond := sorted(found - set(platform.cpu))) and not native:
        raise BadInput(
            f"{llama.name} was compiled for a particular processor ({', '.join(beyond)}) and would not run on others. "
            "Leave --wheels out to build a portable one, or add --native for machines that are all like this one."
        )
    return {name for name in found if platform.cpu}
