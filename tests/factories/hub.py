"""A small hub: the HTTP protocol of the real one, as far as downloads speak it, with faults to order.

``/api/models/{repo}[/revision/{rev}]`` (blobs=true), ``/{repo}/resolve/{rev}/{file}`` with HEAD (etag,
x-linked-etag, x-linked-size, x-repo-commit) and a redirect of large files to ``/content/…``, which knows ranges
and gets no token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 64 * 1024


@dataclass
class HubFile:
    content: bytes | Path
    large: bool = True

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self, start: int, count: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start : start + count]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(count)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.read(0, self.size)).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % self.size + self.read(0, self.size), usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """``with Hub() as hub: hub.add("lab/tiny", {...})``. Orders for faults are plain attributes."""

    repositories: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    commit: str = COMMIT
    tokens: set[str] = field(default_factory=set)  # with any, repositories are private
    gated: bool = False
    status: int = 0  # answer everything with it
    busy_answers: int = 0  # so many 429 first
    cut_after: list[int] = field(default_factory=list)  # each content request takes one: bytes until the line breaks
    bytes_per_second: float = 0.0
    damage: int = 0  # so many contents with a wrong byte
    ignore_ranges: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def add(self, repo: str, files: dict[str, bytes | Path], *, small: tuple[str, ...] = (".json", ".txt")) -> None:
        self.repositories[repo] = {name: HubFile(c, large=not name.endswith(small)) for name, c in files.items()}

    def __enter__(self) -> Hub:
        handler = type("Bound", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def ranges(self) -> list[str]:
        """The ranges that were asked for, in order."""
        return [h["range"] for _, path, h in self.requests if "range" in h and path.startswith("/content/")]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        if hub.status:
            return self._say(hub.status, {"error": "as ordered"})
        if hub.busy_answers > 0:
            hub.busy_answers -= 1
            return self._say(429, {"error": "slow down"}, {"Retry-After": "1"})
        if found := re.match(r"/content/(.+)/([^/]+)$", path):
            return self._content(found[1], found[2])
        api = re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?$", path)
        resolve = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)
        found = api or resolve
        if found is None:
            return self._say(404, {"error": "not found"})
        repo, revision = found[1], found[2] or "main"
        if self._refuse(repo, revision, listing=api is not None):
            return None
        files = hub.repositories[repo]
        if api is not None:
            blobs = parse_qs(parts.query).get("blobs")
            return self._say(200, self._info(repo, files, bool(blobs)))
        assert resolve is not None
        return self._resolve(repo, resolve[3], files)

    def _refuse(self, repo: str, revision: str, *, listing: bool) -> bool:
        hub = self.hub
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and hub.tokens and given not in hub.tokens:
            self._say(401, {"error": "x"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo not in hub.repositories or (hub.tokens and not hub.gated and given not in hub.tokens):
            self._say(401 if not given else 404, {"error": "x"}, {"X-Error-Code": "RepoNotFound"})
        elif hub.gated and given not in hub.tokens and not listing:
            self._say(403 if given else 401, {"error": "x"}, {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", hub.commit):
            self._say(404, {"error": "x"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def _info(self, repo: str, files: dict[str, HubFile], blobs: bool) -> dict[str, Any]:
        siblings = []
        for name, file in files.items():
            entry: dict[str, Any] = {"rfilename": name}
            if blobs:
                entry |= {"size": file.size, "blobId": file.blob_id}
                if file.large:
                    entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 135}
            siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": self.hub.commit, "gated": self.hub.gated, "siblings": siblings}

    def _resolve(self, repo: str, name: str, files: dict[str, HubFile]) -> None:
        file = files.get(name)
        if file is None:
            return self._say(404, {"error": "x"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": self.hub.commit, "ETag": f'"{file.blob_id}"'}
        if not file.large:
            return self._send(file, headers)
        headers |= {
            "X-Linked-Etag": f'"{file.sha256}"',
            "X-Linked-Size": str(file.size),
            # The real one sends to another host; another name of this one is as good, and gets no token either.
            "Location": f"http://localhost:{self.server.server_port}/content/{repo}/{name}?Signature=secret",  # type: ignore[attr-defined]
        }
        return self._say(302, {}, headers)

    def _content(self, repo: str, name: str) -> None:
        assert "authorization" not in {k.lower() for k in self.headers}, "the token went to another host"
        return self._send(self.hub.repositories[repo][name], {})

    def _send(self, file: HubFile, headers: dict[str, str]) -> None:
        hub, start, status = self.hub, 0, 200
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and not hub.ignore_ranges:
            start, status = int(wanted[1]), 206
            if start >= file.size:
                return self._say(416, {"error": "range"})
            headers["Content-Range"] = f"bytes {start}-{file.size - 1}/{file.size}"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(file.size - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        cut = start + hub.cut_after.pop(0) if file.large and hub.cut_after else None
        damaged = file.large and hub.damage > 0
        if damaged:
            hub.damage -= 1
        try:
            while start < file.size:
                data = file.read(start, min(BLOCK, file.size - start))
                if cut is not None and start + len(data) > cut:
                    self.wfile.write(data[: max(0, cut - start)])
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return None
                if damaged:
                    data = bytes([data[0] ^ 1]) + data[1:]
                    damaged = False
                self.wfile.write(data)
                start += len(data)
                if hub.bytes_per_second:
                    time.sleep(len(data) / hub.bytes_per_second)
        except OSError:
            self.close_connection = True
        return None

    def _say(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
