"""The wheels of the app and of everything it needs on the target: built, downloaded, and checked to be complete."""

from __future__ import annotations

import contextlib
import email.parser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from quantize.bundle import portable
from quantize.bundle.platforms import Platform
from quantize.errors import BadInput
from quantize.progress import Progress

PROJECT = Path(__file__).resolve().parents[2]
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "pediatricsgpt.py", "tui", "trainer", "quantize")
_ROUNDS = 5  # of asking pip for what foreign markers add; one is the rule


@dataclass(frozen=True)
class Wheel:
    """A wheel file with the part of its metadata that matters here."""

    path: Path
    name: str
    version: str
    requires: tuple[Requirement, ...]

    @classmethod
    def read(cls, path: Path) -> Wheel:
        """Raises BadInput when the file is not a whole wheel."""
        try:
            name, version, _, _ = parse_wheel_filename(path.name)
            with zipfile.ZipFile(path) as archive:
                member = next(n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
                metadata = email.parser.BytesParser().parsebytes(archive.read(member))
        except (ValueError, StopIteration, OSError, zipfile.BadZipFile) as error:
            raise BadInput(f"{path} is not a whole wheel ({error}); remove it and start again.") from error
        requires = tuple(Requirement(line) for line in metadata.get_all("Requires-Dist") or [])
        return cls(path, name, str(version), requires)

    def fits(self, platform: Platform, python: str) -> bool:
        """Whether it installs on that platform with that Python (CPython)."""
        tags = parse_wheel_filename(self.path.name)[3]
        ours = f"cp{python.replace('.', '')}"
        return any(
            platform.accepts(tag.platform)
            and (tag.interpreter in (ours, "py3") or (tag.abi == "abi3" and _older(tag.interpreter, ours)))
            for tag in tags
        )


def project_version() -> str:
    """Version of the app. Raises BadInput outside a clone of the project."""
    file = PROJECT / "pyproject.toml"
    if not file.is_file():
        raise BadInput("`bundle` packs the app from its source: run it in a clone of the project (make install).")
    return tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]


def pinned(package: str) -> str:
    """The version of constraints.txt, which is what everything is tested with."""
    for line in (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if canonicalize_name(name) == package:
            return version.strip()
    raise BadInput(f"constraints.txt does not pin {package}; add it.")


def git_state() -> tuple[str | None, bool]:
    """Commit of the clone, and whether files differ from it; (None, False) without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--", *_SOURCES))
    except (OSError, subprocess.CalledProcessError):
        return None, False


def app_wheel(target: Path) -> Path:
    """Builds the app's wheel from a copy of its source, so that old build folders cannot leak into it.

    The same source gives the same bytes. Raises BadInput when it fails or a file of the app is not in it.
    """
    try:
        epoch = _git("log", "-1", "--format=%ct")
    except (OSError, subprocess.CalledProcessError):
        epoch = "315619200"  # zip files cannot be older than 1980
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        source.mkdir()
        for name in _SOURCES:
            if (PROJECT / name).is_dir():
                shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.part"))
            else:
                shutil.copy2(PROJECT / name, source)
        _pip(
            ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", "-w", work, str(source)],
            "The app's wheel could not be built (it needs setuptools: make install)",
            {"SOURCE_DATE_EPOCH": epoch},
        )
        built = next(Path(work).glob("pediatricsgpt-*.whl"))
        if missing := missing_files(built):
            raise BadInput(
                f"The app's wheel lacks {', '.join(missing[:5])}; add the pattern to package-data in pyproject.toml."
            )
        return Path(shutil.copy2(built, target / built.name))


def missing_files(wheel: Path) -> list[str]:
    """Files of the terminal app (code, cards, styles, embedded model) that the wheel lacks or has otherwise."""
    missing = []
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        for path in sorted((PROJECT / "tui").rglob("*")):
            name = path.relative_to(PROJECT).as_posix()
            if not path.is_file() or "__pycache__" in path.parts or path.suffix == ".part":
                continue
            if name not in packed or archive.read(name) != path.read_bytes():
                missing.append(name)
    return missing


def llama_wheel(platform: Platform, folder: Path | None, cache: Path, here: bool, progress: Progress) -> Path:
    """The llama-cpp-python wheel: the one in `folder`, or built portable when `here` (this machine's platform).

    Raises BadInput when there is none, or it is damaged.
    """
    path = _llama_wheel(platform, folder, cache, here, progress)
    if not is_whole(path):
        raise BadInput(f"{path} is damaged; remove it, then build or copy it again.")
    return path


def _llama_wheel(platform: Platform, folder: Path | None, cache: Path, here: bool, progress: Progress) -> Path:
    wanted = pinned(portable.PACKAGE)
    for path in sorted(folder.glob("*.whl")) if folder else []:
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except ValueError:
            continue
        if name == portable.PACKAGE and str(version) == wanted:
            if any(platform.accepts(tag.platform) for tag in tags):
                return path
            raise BadInput(f"{path.name} is not for {platform.name}; give the wheel for it with --wheels.")
    if here and folder is None:
        return portable.build(platform, wanted, cache, progress)
    raise BadInput(
        f"{'--wheels holds no' if folder else 'The index has no'} {portable.PACKAGE} {wanted} wheel for "
        f"{platform.name}. Build one on such a machine and give its folder with --wheels:\n"
        f"  {portable.build_command(platform, wanted)}"
    )


def dependencies(
    platform: Platform, pythons: Iterable[str], roots: list[Wheel], folder: Path | None, cache: Path
) -> list[Path]:
    """Every other wheel that the `roots` need, on each of the Python versions, and pip itself.

    pip evaluates environment markers for the machine it runs on; so the result is walked with the target's markers,
    and what is missing is asked for by name. Raises BadInput when the index does not have it.
    """
    pythons = tuple(pythons)
    asked = [_plain(need) for root in roots for need in _needs(root, "", platform, pythons) if not _among(need, roots)]
    asked += [f"pip=={installed_version('pip')}"]
    constraints = (PROJECT / "constraints.txt").read_bytes()
    key = hashlib.sha256(repr((platform, pythons, sorted(asked))).encode() + constraints).hexdigest()[:12]
    store = cache / "wheels" / f"{platform.name}-{key}"
    store.mkdir(parents=True, exist_ok=True)
    for _ in range(_ROUNDS):
        wheels = [*roots, *(Wheel.read(path) for path in sorted(store.glob("*.whl")) if _kept(path))]
        used, missing = closure(platform, pythons, wheels, ["pediatricsgpt", "pip"])
        if not missing:
            return sorted(wheel.path for wheel in used if wheel not in roots)
        asked = sorted({*asked, *map(_plain, missing)})
        for python in pythons:
            _download(platform, python, asked, folder, store)
    raise BadInput(f"These packages could not be found for {platform.name}: {', '.join(map(str, missing))}.")


def closure(
    platform: Platform, pythons: Iterable[str], wheels: list[Wheel], names: Iterable[str]
) -> tuple[list[Wheel], list[Requirement]]:
    """(the wheels that `names` reach on the target, the requirements that no wheel meets)."""
    used: dict[Path, Wheel] = {}
    missing: dict[str, Requirement] = {}
    for python in pythons:
        fitting = [wheel for wheel in wheels if wheel.fits(platform, python)]
        queue = [Requirement(name) for name in names]
        seen: set[tuple[str, str]] = set()
        while queue:
            need = queue.pop()
            wheel = next((w for w in fitting if _meets(w, need)), None)
            if wheel is None:
                missing[str(need)] = need
                continue
            used[wheel.path] = wheel
            for extra in ("", *sorted(need.extras)):
                if (wheel.name, extra) not in seen:
                    seen.add((wheel.name, extra))
                    queue += _needs(wheel, extra, platform, (python,))
    return list(used.values()), list(missing.values())


def is_whole(path: Path) -> bool:
    """Whether every byte of a wheel is what its own checksums say."""
    damage = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)  # what zipfile raises for flipped bits
    with contextlib.suppress(*damage), zipfile.ZipFile(path) as archive:
        return archive.testzip() is None
    return False


def system_needs(wheels: Iterable[Path]) -> tuple[str | None, list[str]]:
    """(newest glibc any library in the wheels asks for, system libraries that are not always there)."""
    newest, libraries = 0, set()
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not re.search(r"\.so(\.|$)", name):
                    continue
                data = archive.read(name)
                newest = max([newest, *(int(minor) for minor in re.findall(rb"\0GLIBC_2\.(\d+)", data))])
                libraries |= {found.decode() for found in re.findall(rb"\0(lib(?:gomp|stdc\+\+)\.so\.\d+)(?=\0)", data)}
    return (f"2.{newest}" if newest else None), sorted(libraries)


def unpacked_bytes(wheels: Iterable[Path]) -> int:
    """Room the wheels take once installed; a fifth more for compiled Python files."""
    total = 0
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            total += sum(entry.file_size for entry in archive.infolist())
    return total * 6 // 5


def _kept(path: Path) -> bool:
    """Whether a cached wheel is whole; one that is not is removed, to be fetched again."""
    if is_whole(path):
        return True
    path.unlink()
    return False


def _download(platform: Platform, python: str, asked: list[str], folder: Path | None, store: Path) -> None:
    options = ["--only-binary=:all:", "--python-version", python, "-c", str(PROJECT / "constraints.txt")]
    for tag in platform.tags:
        options += ["--platform", tag]
    if folder:
        options += ["--find-links", str(folder)]
    _pip(
        ["download", "--quiet", *options, "-d", str(store), *asked],
        f"The wheels for {platform.name}, Python {python} could not be downloaded (is the index within reach?)",
    )


def _pip(arguments: list[str], failure: str, environment: dict[str, str] | None = None) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        errors="replace", check=False,
    )  # fmt: skip
    if process.returncode:
        lines = [line for line in process.stdout.splitlines() if not line.startswith("WARNING: Location")]
        raise BadInput("\n".join([*lines[-12:], f"{failure}."]))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _needs(wheel: Wheel, extra: str, platform: Platform, pythons: Iterable[str]) -> Iterator[Requirement]:
    for need in wheel.requires:
        environments = (
            {**platform.markers, "python_version": p, "python_full_version": f"{p}.0", "extra": extra,
             "implementation_name": "cpython", "platform_python_implementation": "CPython"}
            for p in pythons
        )  # fmt: skip
        # A requirement of the wheel itself counts once, with extra ""; one of an extra only with it.
        if need.marker is None:
            if not extra:
                yield need
        elif any(need.marker.evaluate(environment) for environment in environments):
            yield need


def _meets(wheel: Wheel, need: Requirement) -> bool:
    return wheel.name == canonicalize_name(need.name) and need.specifier.contains(wheel.version, prereleases=True)


def _among(need: Requirement, wheels: list[Wheel]) -> bool:
    return any(_meets(wheel, need) for wheel in wheels)


def _plain(need: Requirement) -> str:
    """The requirement without its marker, which pip would evaluate for the wrong machine."""
    extras = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    return f"{need.name}{extras}{need.specifier}"


def _older(interpreter: str, ours: str) -> bool:
    return interpreter.startswith("cp3") and int(interpreter[3:]) <= int(ours[3:])
