"""push and pull, through the real huggingface_hub, against a stand-in for the hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_distribution import make_distribution, write_noise
from stand_in_hub import TOKEN, Hub, stand_in_hub

from quantize import hub as hub_module
from quantize.commands import pull, push
from quantize.distribution.manifest import Distribution, write_sums

ROOT = Path(__file__).resolve().parents[2]
REPO = "somebody/tiny"
BLOCK = 1 << 20
Q8, Q4, ADAPTER = "tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "adapters/diagnosis.gguf"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole distribution. Read only."""
    return make_distribution(tmp_path_factory.mktemp("made") / "dist")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process finds through HF_ENDPOINT, with a token; nothing of the user's own is touched."""
    monkeypatch.setattr(hub_module, "_PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    with stand_in_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


# Round trip


def test_push_then_pull_byte_for_byte(hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push.main([str(dist), REPO, "--private", "--message", "first", "--yes", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert pushed["creates"] is True
    assert hub.repos[REPO].private
    assert hub.repos[REPO].branches["main"] == pushed["commit"]
    assert len(hub.repos[REPO].commits) == 2  # the first is the hub's own: all files came in one
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "back"), "--json"]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert pulled["missing"] == []
    assert contents(tmp_path / "back") == contents(dist)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "back", check=True)


def test_the_users_own_door_opens_though_the_program_is_offline(hub: Hub, dist: Path, tmp_path: Path) -> None:
    """As separate programs, with the environment that this suite and the trainer set."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for arguments in (["push", str(dist), REPO, "--yes"], ["pull", REPO, "--all"]):
        done = subprocess.run(
            [sys.executable, "-m", "pediatricsgpt", *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "dist/tiny") == contents(dist)
    assert not [seen for seen in hub.seen if "telemetry" in seen.path or "harness" in seen.path]
    assert not any("torch/" in seen.headers.get("user-agent", "") for seen in hub.seen)


def test_pull_imports_no_torch() -> None:
    script = "import sys; from quantize.commands import pull, push; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


# Pull


def serve(hub: Hub, dist: Path, **changes: bytes) -> None:
    hub.add(REPO, contents(dist) | changes)


def test_only_what_is_wanted_is_fetched(hub: Hub, dist: Path, tmp_path: Path) -> None:
    serve(hub, dist)
    to = tmp_path / "to"
    assert pull.main([REPO, "--quant", "Q4_K_M", "--to", str(to)]) == 0
    assert set(contents(to)) == set(contents(dist)) - {Q8}
    assert not hub.requests("GET", Q8)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=to, check=True)
    # The other one is added later; what is there is neither fetched nor lost.
    hub.seen.clear()
    assert pull.main([REPO, "--quant", "Q8_0", "--to", str(to)]) == 0
    assert contents(to) == contents(dist)
    assert not hub.requests("GET", Q4)


def test_several_models_are_not_chosen_silently(
    hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    assert pull.main([REPO, "--to", str(tmp_path / "to")]) == 2
    assert "Choose with --quant" in said(capsys)
    assert pull.main([REPO, "--quant", "Q2_K", "--to", str(tmp_path / "to")]) == 2
    assert "Q8_0 (1 MiB), Q4_K_M (1 MiB)" in said(capsys)
    assert not (tmp_path / "to").exists()


def test_a_connection_cut_in_the_middle_goes_on_from_there(hub: Hub, dist: Path, tmp_path: Path) -> None:
    serve(hub, dist)
    hub.cut_after[Q8] = [BLOCK + 5000]
    assert pull.main([REPO, "--quant", "Q8_0", "--to", str(tmp_path / "to")]) == 0
    first, second = hub.requests("GET", f"stored/{hashlib.sha256(contents(dist)[Q8]).hexdigest()}")
    assert "range" not in first.headers
    # What came before the cut is kept, but for less than one block.
    assert BLOCK <= int(second.headers["range"].removeprefix("bytes=").removesuffix("-")) <= BLOCK + 5000
    assert contents(tmp_path / "to")[Q8] == contents(dist)[Q8]


def test_a_second_run_goes_on_where_the_first_gave_up(
    hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    to = tmp_path / "to"
    hub.cut_after[Q8] = [BLOCK, *[0] * hub_module._TRIES]
    command = [REPO, "--quant", "Q8_0", "--to", str(to)]
    assert pull.main(command) == 2
    assert "goes on where it stopped" in said(capsys)
    assert not any(path.suffix in (".gguf", ".json") for path in to.iterdir())
    hub.seen.clear()
    hub.cut_after.clear()
    assert pull.main(command) == 0
    (request,) = hub.requests("GET", "/stored/" + hashlib.sha256(contents(dist)[Q8]).hexdigest())
    assert request.headers["range"] == f"bytes={BLOCK}-"
    assert contents(to)[Q8] == contents(dist)[Q8]


def test_a_server_without_ranges_begins_anew(hub: Hub, dist: Path, tmp_path: Path) -> None:
    serve(hub, dist)
    hub.ignores_ranges = True
    hub.cut_after[Q8] = [BLOCK]
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "to")]) == 0
    assert contents(tmp_path / "to") == contents(dist)


def test_a_killed_pull_goes_on(hub: Hub, dist: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a file, in the user's own process."""
    serve(hub, dist)
    to = tmp_path / "to"
    script = (
        "import sys, time\n"
        "from quantize import hub\n"
        "from quantize.commands import pull\n"
        "real = hub._go_on\n"
        "def slow(url, part, have, size, progress):\n"
        "    def held(done, total):\n"
        "        if done < total: print('here', flush=True)\n"
        # Not one long sleep: a signal just before it would not end it.
        "        for _ in range(600 * (done < total)): time.sleep(0.1)\n"
        "    real(url, part, have, size, held)\n"
        "hub._go_on = slow\n"
        "sys.exit(pull.main(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, REPO, "--quant", "Q8_0", "--to", str(to)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "goes on from there" in errors
    assert not list(to.glob("*.gguf"))
    hub.seen.clear()
    assert pull.main([REPO, "--quant", "Q8_0", "--to", str(to)]) == 0
    assert hub.requests("GET", "/stored/")[0].headers["range"] == f"bytes={BLOCK}-"
    assert set(contents(to)) == set(contents(dist)) - {Q4}


@pytest.mark.parametrize("name", [Q8, ADAPTER, "README.md"])
def test_a_wrong_checksum_is_named_and_names_nothing(
    name: str, hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    to = tmp_path / "to"
    wrong = bytearray(contents(dist)[name])
    wrong[-3] ^= 4
    hub.replaced[name] = bytes(wrong)
    assert pull.main([REPO, "--all", "--to", str(to)]) == 2
    assert f"{name} came from {hub.url} with a wrong checksum" in said(capsys)
    assert not [path for path in contents(to) if not path.startswith(".pull.part/")]
    hub.replaced.clear()
    assert pull.main([REPO, "--all", "--to", str(to)]) == 0
    assert contents(to) == contents(dist)


def test_a_longer_file_is_not_written_to_the_end(
    hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    hub.replaced[Q8] = contents(dist)[Q8] + bytes(5 * BLOCK)
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "to")]) == 2
    assert f"is longer than the {len(contents(dist)[Q8])} bytes of its manifest" in said(capsys)
    assert not list((tmp_path / "to").glob("*.gguf"))


def test_a_right_checksum_of_a_broken_model_is_refused(
    hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(dist, tmp_path / "broken")
    (broken / Q8).write_bytes(b"GGUF" + bytes(200))
    seal(broken)
    serve(hub, broken)
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "to")]) == 2
    assert f"{Q8} of {REPO} is no usable model" in said(capsys)
    assert not list((tmp_path / "to").glob("*.gguf"))


def seal(folder: Path) -> None:
    """Brings manifest and checksums of a changed folder up to date."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["outputs"]:
        data = (folder / name).read_bytes()
        manifest["outputs"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    sums = {name: value["sha256"] for name, value in manifest["outputs"].items()}
    write_sums(
        folder / "SHA256SUMS",
        sums | {"manifest.json": hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()},
    )


def test_an_older_distribution_stays_until_the_new_one_is_whole(
    hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    to = make_distribution(tmp_path / "to", parameters=99, adapters={})
    write_noise(tmp_path / "other.gguf", 9, 8)
    shutil.copy(tmp_path / "other.gguf", to / Q8)
    seal(to)
    (to / "mine.txt").write_text("mine")
    before = contents(to)
    command = [REPO, "--quant", "Q4_K_M", "--to", str(to)]
    assert pull.main(command) == 2
    assert "--force" in said(capsys)
    hub.replaced[ADAPTER] = b"x" * len(contents(dist)[ADAPTER])
    assert pull.main([*command, "--force"]) == 2
    assert {n: d for n, d in contents(to).items() if not n.startswith(".pull.part/")} == before
    hub.replaced.clear()
    assert pull.main([*command, "--force"]) == 0
    after = contents(to)
    assert after.pop("mine.txt") == b"mine"
    assert set(after) == set(contents(dist)) - {Q8}
    Distribution.open(to).verify(to, lambda *_: None)


def test_a_full_disk_is_said_first(
    hub: Hub, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10, 5, 5))
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "to")]) == 2
    assert "GiB free" in said(capsys)
    assert not hub.requests("GET", "/stored/")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["somebody/absent"], "shows no repository somebody/absent"),
        ([REPO, "--revision", "nowhere"], "no such revision"),
        (["somebody/foreign"], "has no manifest.json"),
        (["somebody/halved", "--all"], f"lacks {Q8}"),
        (["somebody/evil", "--all"], "no place inside a distribution"),
        ([REPO, "--endpoint", "example.org"], "no address of a hub"),
    ],
)
def test_what_is_not_there_is_said(
    arguments: list[str], message: str, hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    hub.add("somebody/foreign", {"model.gguf": b"GGUF"})
    files = contents(dist)
    hub.add("somebody/halved", {name: data for name, data in files.items() if name != Q8})
    sums = files["SHA256SUMS"] + b"0" * 64 + b"  ../../evil\n"
    hub.add("somebody/evil", files | {"SHA256SUMS": sums})
    assert pull.main([*arguments, "--to", str(tmp_path / "to")]) == 2
    assert message in said(capsys)
    assert not (tmp_path / "to").exists()


def test_a_private_repository_needs_a_token_and_the_token_stays_with_the_hub(
    hub: Hub, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, contents(dist), private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "to")]) == 2
    assert "hf auth login" in said(capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "to")]) == 0
    stored = hub.requests("GET", "/stored/")
    assert {f"http://127.0.0.1:{seen.port}" for seen in stored} == {hub.storage_url}
    assert all("authorization" not in seen.headers for seen in stored)
    assert all("authorization" in seen.headers for seen in hub.requests("GET", "/resolve/"))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "hf auth login"),
        (403, "write access"),
        (404, "has no /api/models"),
        (429, "patience"),
        (500, "answered 500"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    status: int, message: str, hub: Hub, dist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(hub, dist)
    hub.statuses["/api/models"] = [status] * 20
    assert pull.main([REPO, "--all"]) == 2
    assert message in said(capsys)


def test_a_busy_hub_is_asked_again(hub: Hub, dist: Path, tmp_path: Path) -> None:
    serve(hub, dist)
    hub.statuses["/stored/"] = [503, 503]
    assert pull.main([REPO, "--all", "--to", str(tmp_path / "to")]) == 0
    assert contents(tmp_path / "to") == contents(dist)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        assert pull.main([REPO]) == 2
    assert "cannot be reached" in said(capsys)


def test_a_sign_in_page_is_not_taken_for_a_hub(hub: Hub, dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.statuses["/api/models"] = [200]
    assert pull.main([REPO]) == 2
    assert "sign-in page" in said(capsys)


# Push


def test_dry_run_opens_no_connection(
    hub: Hub, dist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert push.main([str(dist), REPO, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["files"]) == set(contents(dist))
    assert found["notes"] == ["A demonstration model: its card says that it is not for clinical use."]
    assert hub.seen == []


def test_nothing_is_published_without_a_yes(hub: Hub, dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push.main([str(dist), REPO]) == 2
    assert "say --yes" in said(capsys)
    assert hub.repos == {}


@pytest.mark.parametrize(("answer", "code"), [("", 2), ("n", 2), ("\x04", 2), ("y", 0)])
def test_the_plan_is_shown_and_confirmed(
    answer: str, code: int, hub: Hub, dist: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(*_: str) -> str:
        if answer == "\x04":  # Ctrl-D
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", typed)
    assert push.main([str(dist), REPO]) == code
    shown = said(capsys)
    assert "PUBLIC, a new repository" in shown
    assert ADAPTER in shown
    assert (REPO in hub.repos) == (code == 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / Q8).write_bytes(b"x" + (d / Q8).read_bytes()[1:]), f"{Q8} is not what SHA256SUMS says"),
        (lambda d: (d / "adapters/extra.gguf").write_bytes(b"x"), "adapters/extra.gguf is not named"),
        (lambda d: (d / ".env").write_text("secret"), ".env is not named"),
        (lambda d: fail(d), "did not pass its checks (kld_vs_f32 (Q8_0))"),
        (lambda d: (d / Q4).unlink(), f"{Q4} is missing"),
        (lambda d: (d / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
        (lambda d: [(d / Q4).write_bytes(b"GGUF" + bytes(99)), seal(d)], f"{Q4} is no usable model"),
    ],
    ids=["changed", "unnamed", "hidden", "failed", "missing", "no sums", "broken"],
)
def test_what_may_not_be_published(
    damage: Any, message: str, hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(dist, tmp_path / "copy")
    damage(folder)
    assert push.main([str(folder), REPO, "--yes"]) == 2
    assert message in said(capsys)
    assert hub.seen == []


def fail(folder: Path) -> None:
    report = json.loads((folder / "fidelity.json").read_text())
    (folder / "fidelity.json").write_text(json.dumps({**report, "passed": False, "failed": ["kld_vs_f32 (Q8_0)"]}))
    seal(folder)


def test_a_second_push_sends_only_what_is_new_and_removes_what_is_not_any_more(
    hub: Hub, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push.main([str(dist), REPO, "--yes"]) == 0
    main = hub.repos[REPO].branches["main"]
    hub.repos[REPO].commits[main]["their-own.txt"] = b"kept"
    hub.seen.clear()
    less = shutil.copytree(dist, tmp_path / "less")
    shutil.rmtree(less / "adapters")
    manifest = json.loads((less / "manifest.json").read_text())
    del manifest["outputs"][ADAPTER]
    (less / "manifest.json").write_text(json.dumps(manifest))
    seal(less)
    capsys.readouterr()
    assert push.main([str(less), REPO, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [ADAPTER]
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches["main"]]
    assert set(files) - {".gitattributes"} == set(contents(less)) | {"their-own.txt"}
    assert not hub.requests("PUT", "/upload/")  # the models are there already


def test_an_interrupted_push_goes_on(hub: Hub, dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256((dist / Q4).read_bytes()).hexdigest()
    hub.statuses[f"/upload/{digest}"] = [400]
    assert push.main([str(dist), REPO, "--yes"]) == 2
    assert "answered 400" in said(capsys)
    assert list(hub.repos[REPO].commits.values()) == [{".gitattributes": b"*.gguf lfs"}]  # nothing half published
    hub.seen.clear()
    assert push.main([str(dist), REPO, "--yes"]) == 0
    assert [seen.path for seen in hub.requests("PUT", "/upload/")] == [f"/upload/{digest}"]


def test_another_branch(hub: Hub, dist: Path, tmp_path: Path) -> None:
    hub.add(REPO, {"README.md": b"theirs"})
    assert push.main([str(dist), REPO, "--revision", "v2", "--yes"]) == 0
    assert hub.repos[REPO].commits[hub.repos[REPO].branches["main"]] == {"README.md": b"theirs"}
    assert pull.main([REPO, "--revision", "v2", "--all", "--to", str(tmp_path / "to")]) == 0
    assert contents(tmp_path / "to") == contents(dist)


def test_private_is_not_promised_of_a_public_repository(
    hub: Hub, dist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, {})
    assert push.main([str(dist), REPO, "--private", "--yes"]) == 2
    assert "exists and is public" in said(capsys)
    assert not hub.requests("POST", "commit")


@pytest.mark.parametrize(
    ("prepare", "repo", "message"),
    [
        (lambda hub: None, "others/tiny", "no rights to create"),
        (lambda hub: change_meanwhile(hub), REPO, "changed meanwhile"),
        (lambda hub: hub.add(REPO, {".gitignore": Q8.encode()}), REPO, f"{Q8} did not arrive"),
    ],
    ids=["403", "412", "gitignore"],
)
def test_what_goes_wrong_on_the_hub_is_said(
    prepare: Any, repo: str, message: str, hub: Hub, dist: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(hub)
    assert push.main([str(dist), repo, "--yes"]) == 2
    assert message in said(capsys)


def change_meanwhile(hub: Hub) -> None:
    hub.add(REPO, {"README.md": b"theirs"})
    hub.meanwhile = lambda: hub.add(REPO, {"README.md": b"newer"})


def test_a_wrong_token_is_said(
    hub: Hub, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push.main([str(dist), REPO, "--yes"]) == 2
    assert "does not know you" in said(capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push.main([str(dist), REPO, "--yes"]) == 2
    assert "needs a token" in said(capsys)


# What we rely on in huggingface_hub


def test_contract_constants_decide_when_they_are_asked() -> None:
    """`hub.online` sets them for a while; they must be read at the call, and come back."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers
    from huggingface_hub.utils._runtime import is_xet_available

    before = (constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET, constants.HF_HUB_DISABLE_TELEMETRY)
    assert constants.is_offline_mode()
    with hub_module.online(chunked=False):
        assert not constants.is_offline_mode()
        assert not is_xet_available()
        assert "torch/" not in build_hf_headers(token=False)["user-agent"]
    assert before == (constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET, constants.HF_HUB_DISABLE_TELEMETRY)


def test_contract_a_retried_stream_would_begin_anew() -> None:
    """http_stream_backoff must let what fails in its body through when it is told to retry on no exception."""
    import httpx2
    from huggingface_hub.utils import http_stream_backoff

    with (
        stand_in_hub() as running,
        hub_module.online(chunked=False),
        pytest.raises(httpx2.ReadError),
        http_stream_backoff("GET", running.url, retry_on_exceptions=()),
    ):
        raise httpx2.ReadError("broken")
    assert len(running.seen) == 1


def test_contract_the_library_keeps_no_unfinished_file(
    hub: Hub, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for our own download; when this fails, hf_hub_download may take its place."""
    from huggingface_hub import hf_hub_download

    serve(hub, dist)
    hub.cut_after[Q8] = [BLOCK, *[0] * 9]
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with hub_module.online(chunked=False), pytest.raises(Exception, match=r"closed|incomplete"):
        hf_hub_download(REPO, Q8, local_dir=tmp_path / "to", endpoint=hub.url)
    assert not [path for path in (tmp_path / "to").rglob("*") if path.is_file() and path.stat().st_size >= BLOCK]


@pytest.mark.parametrize("command", [push, pull])
def test_help_teaches(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "exit codes" in out
    assert command.main(["a", "b", "c"]) == 2


@pytest.mark.parametrize(
    "address", ["http://hub.example.org", "http://localhost.example.org", "http://10.0.0.1:8080/x"]
)
def test_no_token_goes_out_in_the_clear(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull.main(["somebody/model", "--endpoint", address]) == 2
    assert "unencrypted" in " ".join(capsys.readouterr().err.split())
