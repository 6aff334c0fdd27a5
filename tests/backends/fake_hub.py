"""A hub in a thread: repositories in memory behind the addresses that huggingface_hub calls, and faults on order."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

READER, WRITER, STRANGER = "reader-token-0001", "writer-token-0002", "stranger-token-003"
ROLES = {READER: "read", WRITER: "write", STRANGER: "write"}


@dataclass
class Repository:
    """The commits of a repository, oldest first; each maps names to content."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[digest] = files
        return digest

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches: a status, "cut", "reset" or a callable."""

    pattern: str
    what: int | str | Callable[[], None]
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """Serve repositories on a free port until closed."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.created: dict[str, dict[str, Any]] = {}
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, files: dict[str, bytes], **settings: bool) -> Repository:
        repository = self.repositories.setdefault(name, Repository(**settings))
        repository.commit(files)
        return repository

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.log)


class Handler(BaseHTTPRequestHandler):
    """One request; `hub` is bound by the server."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.handle_request()

    def do_HEAD(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def do_PUT(self) -> None:
        self.handle_request()

    def handle_request(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has given up waiting
            self.serve()

    def serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.log.append(line + (f" {self.headers['Range']}" if self.headers.get("Range") else ""))
        self.cut = self.reset = False
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                if isinstance(fault.what, int):
                    return self.answer(fault.what, b"{}", fault.headers)
                self.cut, self.reset = fault.what in ("cut", "reset"), fault.what == "reset"
                if callable(fault.what):
                    fault.what()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in ROLES:
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            return self.answer(401, b"{}", headers)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, line):
                return getattr(self, method)(token, *found.groups())
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            if self.reset:  # the peer meets an error, not an end
                time.sleep(0.1)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        self.wfile.write(data)

    def json(self, document: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def find(self, token: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit, or None where the answer has been sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token != WRITER):
            self.answer(404 if token else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.head if revision == "main" and repository.commits else revision
        if revision != "main" and commit not in repository.commits:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    def info(self, token: str, name: str, revision: str | None = None) -> None:
        if found := self.find(token, name, revision or "main"):
            repository, commit = found
            self.json({"id": name, "sha": commit, "private": repository.private, "siblings": [], "tags": []})

    def tree(self, token: str, name: str, revision: str) -> None:
        if found := self.find(token, name, revision):
            files = found[0].commits[found[1]]
            self.json([{"type": "file", "path": n, "size": len(d), "oid": digest(d)} for n, d in files.items()])

    def resolve(self, token: str, name: str, revision: str, file: str) -> None:
        found = self.find(token, name, revision)
        if not found:
            return
        if found[0].gated and token != WRITER:
            return self.answer(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo"})
        data = found[0].commits[found[1]][file]
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": found[1], "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, data, headers)
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[int(wanted[1]) :], headers)
        return self.answer(200, data, headers)

    def whoami(self, token: str) -> None:
        if not token:
            return self.answer(401, b"{}")
        name = "stranger" if token == STRANGER else "me"
        self.json({"name": name, "orgs": [], "auth": {"accessToken": {"role": ROLES[token]}}})

    def create(self, token: str) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.json({"error": "exists", "url": f"{self.hub.address}/{name}"}, 409)
        self.hub.created[name] = wanted
        self.hub.repositories[name] = Repository({"0" * 40: {}}, private=wanted.get("visibility") == "private")
        self.json({"url": f"{self.hub.address}/{name}", "name": name})

    def validate(self, token: str) -> None:
        self.json({"warnings": [], "errors": []})

    def preupload(self, token: str, name: str) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
             "shouldIgnore": False, "oid": None}
            for f in json.loads(self.body)["files"]
        ]  # fmt: skip
        self.json({"files": modes})

    def batch(self, token: str, name: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}?X-Signature=signed-secret"}}}
            for o in json.loads(self.body)["objects"]
            if o["oid"] not in self.hub.blobs
        ]
        self.json({"transfer": "basic", "objects": objects})

    def put(self, token: str, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.answer(200, b"")

    def commit(self, token: str, name: str) -> None:
        if ROLES.get(token) != "write":
            return self.answer(403, b"{}")
        files: dict[str, bytes] = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        repository = self.hub.repositories[name]
        commit = repository.commit({**repository.commits[repository.head], **files})
        self.json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_KIND = r"GET /api/(?:models|datasets)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"{_KIND}/{_NAME}", "info"),
    (rf"{_KIND}/{_NAME}/revision/(.+)", "info"),
    (rf"{_KIND}/{_NAME}/tree/(.+)", "tree"),
    (rf"POST /api/models/{_NAME}/preupload/main", "preupload"),
    (rf"POST /api/models/{_NAME}/commit/main", "commit"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "put"),
    (rf"(?:GET|HEAD) /(?:datasets/)?{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
]
