"""A stand-in for the Hugging Face hub on 127.0.0.1: the endpoints that huggingface_hub calls for push and pull."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_standin"


@dataclass
class Repo:
    """Commits (oid → path → content) and branches (name → oid)."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    """One request."""

    method: str
    path: str
    headers: dict[str, str]
    port: int


@dataclass
class Hub:
    """What the server holds, what it was asked, and what it is to do wrong."""

    url: str = ""
    storage_url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    seen: list[Seen] = field(default_factory=list)
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # file → bytes to send, then break; one per request
    replaced: dict[str, bytes] = field(default_factory=dict)  # file → what is sent instead
    statuses: dict[str, list[int]] = field(default_factory=dict)  # part of a path → statuses to answer, one per request
    ignores_ranges: bool = False
    meanwhile: Callable[[], object] | None = None  # what somebody else does while a push is under way

    def requests(self, method: str, part: str) -> list[Seen]:
        """What was asked with this method and this text in the path."""
        return [seen for seen in self.seen if seen.method == method and part in seen.path]

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """Makes a commit without any upload; returns its oid."""
        repo = self.repos.setdefault(name, Repo(private))
        oid = hashlib.sha1(repr((len(repo.commits), sorted(files))).encode()).hexdigest()
        repo.commits[oid] = files
        repo.branches[branch] = oid
        return oid


def is_large(name: str) -> bool:
    """As the hub decides by .gitattributes."""
    return name.endswith(".gguf")


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """Runs a hub, and beside it, as another origin, the storage that large files are redirected to."""
    hub = Hub()
    servers = [_Server(("127.0.0.1", 0), _handler(hub)) for _ in range(2)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is part of the tests."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _begin(self) -> bool:
        """Notes the request, reads its body, answers a status that was ordered; False when that is all."""
        self.body = self._read()
        port = self.server.server_address[1]
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.seen.append(Seen(self.command, self.path, headers, port))
        self.route = unquote(urlsplit(self.path).path)
        for part, statuses in self.hub.statuses.items():
            if part in self.route and statuses:
                self._answer(statuses.pop(0), b"ordered")
                return False
        return True

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repo | None:
        """As the hub: who may not see a repository learns nothing about it."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._signed_in()):
            status = 404 if self._signed_in() else 401
            self._answer(status, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            self._answer(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
            return None
        return oid

    def do_GET(self) -> None:
        if not self._begin():
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.route):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", self.route):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.route):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/stored/([0-9a-f]{64})/(.+)", self.route):
            self._send(match[2], self.hub.objects[match[1]])
        else:
            self._answer(404)

    def _info(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None or (oid := self._commit(repo, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        self._json({"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0})

    def _tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None or (oid := self._commit(repo, revision)) is None:
            return
        entries: list[dict[str, Any]] = []
        for path, content in repo.commits[oid].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if is_large(path):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None or (oid := self._commit(repo, revision)) is None:
            return
        content = repo.commits[oid].get(path)
        if content is None:
            self._answer(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif is_large(path):
            digest = hashlib.sha256(content).hexdigest()
            self.hub.objects[digest] = content
            place = f"{self.hub.storage_url}/stored/{digest}/{path}"
            size = str(len(content))
            self._answer(302, Location=place, X_Repo_Commit=oid, X_Linked_Etag=f'"{digest}"', X_Linked_Size=size)
        else:
            self._send(path, content)

    def _send(self, path: str, content: bytes) -> None:
        content = self.hub.replaced.get(path, content)
        start, status = 0, 200
        if (wanted := self.headers.get("Range")) and not self.hub.ignores_ranges:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
        body = content[start:]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = self.hub.cut_after.get(path)
        if self.command == "HEAD":
            return
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if not self._begin():
            return
        if self.route == "/api/validate-yaml":
            if self.hub.meanwhile:
                self.hub.meanwhile()
            head = json.loads(self.body)["content"].split("---\n")[1]
            good = isinstance(yaml.safe_load(head), dict)
            self._json({"errors": [] if good else [{"message": "no mapping"}], "warnings": []}, 200 if good else 400)
            return
        if not self._signed_in():
            self._answer(401, b"", X_Error_Message="Invalid credentials in Authorization header")
        elif self.route == "/api/repos/create":
            self._create(json.loads(self.body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.route):
            repo = self.hub.repos[match[1]]
            repo.branches[match[2]] = repo.branches["main"]
            self._json({})
        elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.route):
            self._preupload(json.loads(self.body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.route):
            self._batch(json.loads(self.body))
        elif self.route == "/verify":
            wanted = json.loads(self.body)
            good = len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]
            self._json({}, 200 if good else 404)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.route):
            self._make_commit(match[1], match[2])
        else:
            self._answer(404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "others":
            self._answer(403, b"", X_Error_Message="You have no rights to create a model under this namespace")
        elif name in self.hub.repos:
            self._answer(409, b"", X_Error_Message="You already created this model repo")
        else:
            self.hub.add(name, {".gitattributes": b"*.gguf lfs"}, private=wanted.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{name}"})

    def _preupload(self, wanted: dict[str, Any]) -> None:
        name = re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", self.route)
        assert name is not None
        ignored = self.hub.repos[name[1]].commits[self.hub.repos[name[1]].branches["main"]].get(".gitignore", b"")
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": file["path"].encode() in ignored.split(),
                "oid": None,
            }
            for file in wanted["files"]
        ]
        self._json({"files": answers})

    def _batch(self, wanted: dict[str, Any]) -> None:
        answers = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/upload/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                }
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def _make_commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        repo = self.hub.repos[name]
        parent = repo.branches[revision]
        if lines[0]["value"].get("parentCommit", parent) != parent:
            self._answer(412, b"", X_Error_Message="A commit has happened since")
            return
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.add(name, files, branch=revision)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def do_PUT(self) -> None:
        if not self._begin():
            return
        digest = self.route.rpartition("/")[2]
        good = hashlib.sha256(self.body).hexdigest() == digest
        if good:
            self.hub.objects[digest] = self.body
        self._answer(200 if good else 400)
