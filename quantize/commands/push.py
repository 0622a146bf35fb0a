"""`pediatricsgpt push`: a checked distribution, whole, to the hub in one commit."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from quantize import header, hub, publishing
from quantize.commands.pull import repository
from quantize.commands.shared import command_parser, guarded, progress_bars
from quantize.distribution.manifest import CARD, MANIFEST, REPORT, SUMS, Distribution, is_name
from quantize.distribution.model_card import licence_is_unknown
from quantize.errors import BadInput
from quantize.run_folder import read_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HIDDEN = {publishing.LOCK}  # of files in the folder: not to be published, and not worth a complaint

_EPILOG = """\
examples:
  pediatricsgpt push dist/demo somebody/pediatrics-demo --dry-run
      check the folder and list what would be published; opens no connection
  pediatricsgpt push dist/demo somebody/pediatrics-demo --private
      make a private repository if there is none, show the plan, ask, publish
  pediatricsgpt push dist/demo somebody/pediatrics-demo --revision v2 --message "second run" --yes
      to another branch, without a question

Published is the folder as it was checked: every checksum is compared first, a folder whose checks failed is
refused, and so is a file that its manifest does not name. All goes in one commit; what an earlier push alone had
goes away with it. Stopped? The same command goes on: what the hub has already is not sent again.
A token with write access is needed: `hf auth login`, or HF_TOKEN.
exit codes: 0 published, 2 wrong use or bad input, 130 Ctrl-C
"""


@dataclass(frozen=True)
class Plan:
    """What will be done. `parent` None: the repository is made first, if the hub was asked (`looked_up`).

    `files`: name → bytes, of which `sums` has the sha256 (but not its own file's); `removed`: names.
    """

    folder: Path
    repo: str
    endpoint: str
    private: bool
    revision: str
    message: str
    files: dict[str, int]
    sums: dict[str, str]
    notes: list[str] = field(default_factory=list)
    looked_up: bool = False
    parent: str | None = None
    branch_exists: bool = False
    removed: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {
            "repo": self.repo,
            "endpoint": self.endpoint,
            "private": self.private,
            "revision": self.revision,
            "message": self.message,
            "creates": self.parent is None if self.looked_up else None,
            "files": self.files,
            "removed": self.removed,
            "notes": self.notes,
        }


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return guarded(_run, _parser(), argv)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    folder: Path = arguments.folder
    with progress_bars(console) as progress:
        distribution = checked(folder, progress)
    plan = Plan(
        folder=folder,
        repo=arguments.repo,
        endpoint=hub.endpoint_of(arguments.endpoint),
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message or f"{distribution.name}: {', '.join(distribution.models)}",
        files={name: (folder / name).stat().st_size for name in sorted([*distribution.sums, SUMS])},
        sums=distribution.sums,
        notes=_notes(folder, distribution),
    )
    if arguments.dry_run:
        return _say(plan, {"dry_run": True}, arguments.json, console)
    # Xet's servers stand beside the hub's own address alone; LFS over plain HTTP works everywhere.
    with hub.online(chunked=plan.endpoint == hub.DEFAULT_ENDPOINT), hub.failures(plan.repo, plan.endpoint):
        api = _api(plan)
        plan = looked_up(api, plan)
        _show(plan, console)
        if not arguments.yes:
            _ask(console)
        try:
            commit, url = publish(api, plan)
        except KeyboardInterrupt:
            console.print("The same command goes on; what the hub has already is not sent again.", style="yellow")
            raise
    return _say(plan, {"commit": commit, "url": url}, arguments.json, console)


def checked(folder: Path, progress: Callable[[str, int, int], None]) -> Distribution:
    """A distribution that may be published: every check passed, every file named and as it was. Raises BadInput."""
    found = Distribution.open(folder)
    report = read_object(folder / REPORT)
    if not report.get("passed") or report.get("failed"):
        failed = ", ".join(map(str, report.get("failed") or ())) or "its report does not say that they passed"
        raise BadInput(f"{folder} did not pass its checks ({failed}); export it again, what failed is not published.")
    unnamed = sorted(
        name
        for path in folder.rglob("*")
        if not path.is_dir() and (name := path.relative_to(folder).as_posix()) not in {*found.sums, SUMS, *_HIDDEN}
    )
    if unnamed:
        raise BadInput(f"{folder / unnamed[0]} is not named by {MANIFEST}; move it elsewhere, it would be published.")
    lacking = sorted(set(found.manifest["outputs"]) - set(found.sums))
    if lacking:
        raise BadInput(f"{folder} is only a part of its distribution, {lacking[0]} is missing; push the whole one.")
    found.verify(folder, progress)
    for name in found.models.values():
        try:
            header.read(folder / name)
        except header.Malformed as error:
            raise BadInput(f"{folder / name} is no usable model ({error}); export it again.") from error
    return found


def looked_up(api: HfApi, plan: Plan) -> Plan:
    """The plan against what the repository holds. Raises BadInput when it is public and should be private."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(plan.repo, timeout=30)
    except RepositoryNotFoundError:
        return replace(plan, looked_up=True)
    if plan.private and not info.private:
        raise BadInput(
            f"{plan.repo} exists and is public; make it private at {plan.endpoint}/{plan.repo}/settings, or choose "
            "another repository."
        )
    try:
        info = api.model_info(plan.repo, revision=plan.revision, timeout=30)
        exists = True
    except RevisionNotFoundError:
        exists = False
    there = {file.rfilename for file in info.siblings or []}
    removed = sorted((_earlier(plan, str(info.sha)) & there) - set(plan.files)) if MANIFEST in there else []
    return replace(
        plan,
        looked_up=True,
        parent=str(info.sha),
        private=bool(info.private),
        branch_exists=exists,
        removed=removed,
    )


def publish(api: HfApi, plan: Plan) -> tuple[str, str]:
    """Makes what is missing, sends the files in one commit, and reads back what arrived; returns commit and address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if plan.parent is None:
        api.create_repo(plan.repo, private=plan.private)
    if plan.revision != "main" and not plan.branch_exists:
        api.create_branch(plan.repo, branch=plan.revision)
    operations = [CommitOperationAdd(name, plan.folder / name) for name in plan.files]
    removals = [CommitOperationDelete(name) for name in plan.removed]
    with warnings.catch_warnings():  # about the card's head; the hub shows them on its page
        warnings.simplefilter("ignore")
        made = api.create_commit(
            plan.repo,
            [*operations, *removals],
            commit_message=plan.message,
            revision=plan.revision,
            parent_commit=plan.parent,
        )
    tree = {file.path: file for file in api.list_repo_tree(plan.repo, recursive=True, revision=made.oid)}
    wrong = [name for name in plan.files if not _arrived(tree.get(name), plan.files[name], plan.sums.get(name))]
    if wrong:
        # A .gitignore makes the hub leave files out without a word.
        raise BadInput(
            f"{wrong[0]} did not arrive in {plan.repo} as it is here: look for a .gitignore there, check that nothing "
            "writes to the folder, and push again."
        )
    return made.oid, made.commit_url


def _arrived(file: Any, size: int, digest: str | None) -> bool:
    """The hub knows the sha256 of large files; of the others their length."""
    lfs = getattr(file, "lfs", None)
    return getattr(file, "size", None) == size and (lfs is None or lfs.sha256 == digest)


def _api(plan: Plan) -> HfApi:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    token = get_token()
    if not token:
        raise BadInput("Publishing needs a token with write access: `hf auth login`, or HF_TOKEN in the environment.")
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(endpoint=plan.endpoint, token=token)


def _earlier(plan: Plan, commit: str) -> set[str]:
    """Names that the manifest of an earlier push lists; whatever else lies in the repository is not ours."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(plan.repo, MANIFEST, revision=commit, endpoint=plan.endpoint)
    try:
        return {name for name in json.loads(hub.read_small(url))["outputs"] if is_name(name)}
    except (ValueError, KeyError, TypeError):
        return set()


def _notes(folder: Path, distribution: Distribution) -> list[str]:
    notes = []
    if distribution.manifest.get("demonstration"):
        notes.append("A demonstration model: its card says that it is not for clinical use.")
    if licence_is_unknown((folder / CARD).read_text(encoding="utf-8")):
        notes.append("The card says that the licence is unknown: find out first whether you may pass the model on.")
    return notes


def _show(plan: Plan, console: Console) -> None:
    visible = "private" if plan.private else "PUBLIC"
    state = "an existing repository" if plan.parent else "a new repository"
    if not plan.looked_up:
        state = "made if there is none"
    console.print(
        f"{plan.repo} at {plan.endpoint}: {visible}, {state}, branch {plan.revision}", highlight=False, soft_wrap=True
    )
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    for name, size in plan.files.items():
        table.add_row(name, f"{size:,}")
    for name in plan.removed:
        table.add_row(name, "removed", style="yellow")
    console.print(table)
    console.print(f"Message: {plan.message}", markup=False, highlight=False, soft_wrap=True)
    for note in plan.notes:
        console.print(note, style="yellow", soft_wrap=True)


def _ask(console: Console) -> None:
    if not sys.stdin.isatty():
        raise BadInput("Nobody is there to confirm this; say --yes.")
    try:
        answer = console.input("Publish this? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise BadInput("Nothing was published.")


def _say(plan: Plan, more: dict[str, Any], as_json: bool, console: Console) -> int:
    if as_json:
        print(json.dumps({**plan.record(), **more}, ensure_ascii=False))
    elif "url" in more:
        Console().print(f"Published: {more['url']}", highlight=False, soft_wrap=True)
    else:
        _show(plan, console)
        console.print("Nothing was sent (--dry-run).")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("push", "Publish a distribution folder on the Hugging Face hub.", _EPILOG)
    parser.add_argument("folder", type=Path, metavar="DIST", help="distribution folder that `quantize` made")
    parser.add_argument("repo", type=repository, metavar="REPO", help="repository on the hub, OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="make the repository private; refused for a public one")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="branch, made if missing (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="commit message (default: the model's name and quants)")
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help="the hub's address; it gets your token (default: HF_ENDPOINT, or huggingface.co)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and list only; opens no connection")
    parser.add_argument("--yes", action="store_true", help="publish without asking")
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON object")
    return parser
