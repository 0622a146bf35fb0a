"""`pediatricsgpt pull`: a distribution from the hub, checked before any file gets its name."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from quantize import header, hub, publishing
from quantize.commands.shared import command_parser, guarded, progress_bars
from quantize.distribution.manifest import DOCUMENTS, MANIFEST, SUMS, Distribution, write_sums
from quantize.errors import BadInput
from quantize.run_folder import file_sha256

_PARTS = ".pull.part"
_SPARE_BYTES = 16 << 20

_EPILOG = """\
examples:
  pediatricsgpt pull somebody/pediatrics-0.6b
      dist/pediatrics-0.6b with the model, its adapters and its documents
  pediatricsgpt pull somebody/pediatrics-0.6b --quant Q4_K_M --to models/small
      one of several model files
  pediatricsgpt pull somebody/pediatrics-0.6b --endpoint https://hub.example.org
      through a mirror, where the hub is slow or blocked (or set HF_ENDPOINT)

Stopped in the middle of a file? The same command goes on from there. A file gets its name only when its checksum
and its header are right; until then an older distribution in the folder stays whole. A private repository needs a
token: `hf auth login`, or HF_TOKEN.
exit codes: 0 everything is there, 2 wrong use, bad input or a wrong checksum, 130 Ctrl-C
"""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for. `quants` empty: the only one there is; `everything`: all of them."""

    repo: str
    endpoint: str
    revision: str | None = None
    folder: Path | None = None
    quants: tuple[str, ...] = ()
    everything: bool = False
    force: bool = False


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return guarded(_run, _parser(), argv)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    wanted = Wanted(
        repo=arguments.repo,
        endpoint=hub.endpoint_of(arguments.endpoint),
        revision=arguments.revision,
        folder=arguments.to,
        quants=tuple(dict.fromkeys(arguments.quant or ())),
        everything=arguments.all,
        force=arguments.force,
    )
    try:
        with progress_bars(console) as progress:
            found = pull(wanted, progress)
    except KeyboardInterrupt:
        console.print("What was fetched is kept aside; the same command goes on from there.", style="yellow")
        raise
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    out = Console()
    for name in found["files"]:
        out.print(f"{Path(found['folder']) / name}", highlight=False, soft_wrap=True)
    out.print(f"{found['repo']} at {found['commit'][:12]}: every checksum holds.", highlight=False)
    if found["missing"]:
        out.print(f"Not fetched: {', '.join(found['missing'])} (--quant, --all).", highlight=False, soft_wrap=True)
    return 0


def pull(wanted: Wanted, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Fetches, checks, and only then names the files; returns what was done.

    Raises BadInput, with the file's name when a checksum or a header is wrong.
    """
    with hub.online(chunked=False):
        with hub.failures(wanted.repo, wanted.endpoint):
            commit, there, manifest = _described(wanted)
        names = _chosen(wanted, there)
        folder = wanted.folder or Path("dist") / wanted.repo.split("/")[1]
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder} is a file; choose a folder with --to.")
        with publishing.disk_failures(folder), publishing.locked(folder):
            kept = _kept(folder, there, wanted.force)
            names += [name for name in kept if name not in names]
            parts = folder / _PARTS
            missing = [name for name in names if name not in kept]
            _refuse_full_disk(folder, parts, there, missing)
            parts.mkdir(exist_ok=True)
            try:
                files = {folder / name: _fetched(wanted, commit, there, name, parts, progress) for name in missing}
                (parts / MANIFEST).write_bytes(manifest)
                write_sums(parts / SUMS, {name: there.sums[name] for name in (*names, MANIFEST)})
                files |= {folder / name: parts / name for name in (MANIFEST, SUMS)}
                publishing.publish(folder, files, keep=[folder / name for name in kept])
                shutil.rmtree(parts)
            finally:
                with contextlib.suppress(OSError):  # unfinished files stay for the next time
                    parts.rmdir()
    return {
        "repo": wanted.repo,
        "commit": commit,
        "folder": str(folder),
        "files": sorted([*names, MANIFEST, SUMS]),
        "fetched": sorted(missing),
        "missing": sorted(set(there.sums) - {*names, MANIFEST}),
    }


def _described(wanted: Wanted) -> tuple[str, Distribution, bytes]:
    """The commit, what its manifest and checksums say, and the manifest as it is."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=wanted.endpoint).model_info(wanted.repo, revision=wanted.revision, timeout=30)
    there = {file.rfilename for file in info.siblings or []}
    for name in (MANIFEST, SUMS):
        if name not in there:
            raise BadInput(f"{wanted.repo} has no {name}: it was not published by `pediatricsgpt push`.")
    commit = str(info.sha)
    manifest, sums = (hub.read_small(_url(wanted, commit, name)) for name in (MANIFEST, SUMS))
    found = Distribution.parse(manifest, sums, wanted.repo)
    absent = sorted(set(found.sums) - there)
    if absent:
        raise BadInput(f"{wanted.repo} lacks {absent[0]}, which its {SUMS} names; ask its owner to push it again.")
    return commit, found, manifest


def _url(wanted: Wanted, commit: str, name: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(wanted.repo, name, revision=commit, endpoint=wanted.endpoint)


def _chosen(wanted: Wanted, there: Distribution) -> list[str]:
    """Names of the files to have: the wanted models, all adapters and documents."""
    models = {quant: name for quant, name in there.models.items() if name in there.sums}
    unknown = [quant for quant in wanted.quants if quant not in models]
    sizes = ", ".join(f"{quant} ({there.size(name) / 2**20:.0f} MiB)" for quant, name in models.items())
    if unknown:
        raise BadInput(f"{wanted.repo} has no {unknown[0]}; it has {sizes}.")
    if not wanted.quants and not wanted.everything and len(models) > 1:
        raise BadInput(f"{wanted.repo} has several models: {sizes}. Choose with --quant, or take them with --all.")
    quants = wanted.quants or tuple(models)
    others = [name for name in there.sums if name not in models.values() and name not in (MANIFEST, SUMS)]
    return [*(models[quant] for quant in quants), *sorted(others)]


def _kept(folder: Path, there: Distribution, force: bool) -> list[str]:
    """Names of files that lie in the folder already. Raises BadInput when the folder holds something else."""
    same = {n for n, digest in there.sums.items() if (folder / n).is_file() and file_sha256(folder / n) == digest}
    others = [name for name in (*DOCUMENTS, *there.sums) if (folder / name).exists() and name not in {*same, SUMS}]
    if others and not force:
        raise BadInput(
            f"{folder} holds another {others[0]}; replace what is there with --force once all is fetched, or choose "
            "another folder with --to."
        )
    return sorted(same - {MANIFEST})


def _refuse_full_disk(folder: Path, parts: Path, there: Distribution, names: list[str]) -> None:
    have = sum(part.stat().st_size for name in names if (part := _part(parts, there, name)).exists())
    needed = sum(there.size(name) for name in names) - have + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(
            f"The disk of {folder} has {free / 2**30:.2f} GiB free, these files need {needed / 2**30:.2f} GiB more; "
            "free some space, choose another folder with --to, or a smaller --quant."
        )


def _fetched(
    wanted: Wanted,
    commit: str,
    there: Distribution,
    name: str,
    parts: Path,
    progress: Callable[[str, int, int], None],
) -> Path:
    """The finished part of one file, its checksum and its header right; a wrong one is thrown away."""
    part = _part(parts, there, name)
    with hub.failures(wanted.repo, wanted.endpoint):
        url = _url(wanted, commit, name)
        hub.download(url, part, there.size(name), lambda done, total: progress(name, done, total))
    if file_sha256(part) != there.sums[name]:
        part.unlink()
        raise BadInput(f"{name} came from {wanted.endpoint} with a wrong checksum; nothing was named. Try again.")
    if name.endswith(".gguf"):
        try:
            header.read(part)
        except header.Malformed as error:
            part.unlink()
            raise BadInput(f"{name} of {wanted.repo} is no usable model ({error}); ask its owner.") from error
    return part


def _part(parts: Path, there: Distribution, name: str) -> Path:
    """Known by its content: commits share their unchanged files."""
    return parts / f"{there.sums[name]}{Path(name).suffix}"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("pull", "Fetch a distribution from the Hugging Face hub, and check it.", _EPILOG)
    parser.add_argument("repo", type=repository, metavar="REPO", help="repository on the hub, OWNER/NAME")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder for the files (default: dist/NAME)")
    parser.add_argument("--quant", action="append", metavar="TYPE", help="model file to take, e.g. Q4_K_M; repeatable")
    parser.add_argument("--all", action="store_true", help="take every model file")
    parser.add_argument(
        "--endpoint", metavar="URL", help="hub or mirror; it gets your token (default: HF_ENDPOINT, or huggingface.co)"
    )
    parser.add_argument("--force", action="store_true", help="replace another distribution in the folder")
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")
    return parser


def repository(text: str) -> str:
    """OWNER/NAME, for argparse."""
    if not hub.REPO.fullmatch(text):
        raise argparse.ArgumentTypeError("write OWNER/NAME")
    return text
