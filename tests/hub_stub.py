"""A stand-in for the Hugging Face Hub: an HTTP server with the few addresses that pushing and fetching use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Commit:
    """The files after a commit, and what it was asked to do: a line each of its body."""

    oid: str
    files: dict[str, bytes]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def names(self, key: str) -> set[str]:
        return {line["value"]["path"] for line in self.lines if line["key"] == key}


@dataclass
class HubStub:
    """What the server has: the commits of each repository, and the requests that reached it."""

    repositories: dict[str, list[Commit]] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuses_cards: bool = False
    url: str = ""

    def create(self, name: str) -> None:
        self.repositories[name] = [Commit(f"{0:040x}", {".gitattributes": b""})]

    def commit(self, name: str, lines: list[dict[str, Any]]) -> Commit:
        commits = self.repositories[name]
        files = dict(commits[-1].files)
        for line in lines:
            path = line["value"].get("path")
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[path]
        commits.append(Commit(f"{len(commits):040x}", files, lines))
        return commits[-1]

    def edit(self, name: str, path: str, content: bytes) -> None:
        """What an author does on the Hub's own pages."""
        value = {"path": path, "content": base64.b64encode(content).decode()}
        self.commit(name, [{"key": "file", "value": value}])

    def find(self, name: str, revision: str) -> Commit | None:
        found = [commit for commit in self.repositories[name] if revision in ("main", commit.oid)]
        return found[-1] if found else None


class _Handler(BaseHTTPRequestHandler):
    hub: HubStub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, content in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer({"error": code}, status, {"X-Error-Code": code})

    def _parts(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.queries.append(urlsplit(self.path).query)
        self.hub.tokens.add(self.headers.get("Authorization"))
        return [unquote(part) for part in path.strip("/").split("/")]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "models"]:
            name, action, revision = "/".join(parts[2:4]), (parts[4:5] or ["revision"])[0], (parts[5:6] or ["main"])[0]
        else:
            name, action, revision = "/".join(parts[:2]), "resolve", (parts[3:4] or [""])[0]
        if name not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound")
        if name in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        commit = self.hub.find(name, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        if action == "revision":
            siblings = [{"rfilename": path} for path in commit.files]
            return self._answer({"id": name, "sha": commit.oid, "siblings": siblings})
        if action == "tree":
            files = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in commit.files.items()
            ]
            return self._answer(files)
        content = commit.files["/".join(parts[4:])]
        return self._answer(content, headers={"X-Repo-Commit": commit.oid, "ETag": hashlib.sha1(content).hexdigest()})

    def do_POST(self) -> None:
        parts = self._parts()
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization'] or 'user'}/{asked['name']}"
            status = 409 if name in self.hub.repositories else 200
            if status == 200:
                self.hub.create(name)
                self.hub.private[name] = asked.get("visibility")
            return self._answer({"url": f"{self.hub.url}/{name}"}, status)
        if parts == ["api", "validate-yaml"]:
            errors = [{"message": '"license" must be one of [...]'}] if self.hub.refuses_cards else []
            return self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._answer({"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"]["parentCommit"] != self.hub.repositories[name][-1].oid:
            return self._refuse(412, "ParentCommitMismatch")
        oid = self.hub.commit(name, lines).oid
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self._answer(
            {"commitUrl": url, "commitOid": oid, "pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"}
        )


@contextmanager
def serve_hub() -> Iterator[HubStub]:
    """Run the server in a thread."""
    hub = HubStub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
