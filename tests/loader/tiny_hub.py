"""A hub on loopback: the few endpoints a download needs, with connections that break on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class TinyHub:
    """`breaks[file]` says how often a download of that file stops in the middle."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.gated: set[str] = set()
        self.breaks: dict[str, int] = {}
        self.sizes: dict[str, int] = {}  # of weights, where it says another than the true one
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.tokens: set[str] = set()
        self.url = ""

    def bytes_asked(self, file: str) -> list[str | None]:
        """The range of each GET of a file."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(file)]


@contextmanager
def serving(hub: TinyHub) -> Iterator[TinyHub]:
    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: TinyHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append((self.command, path, self.headers.get("Range")))
        if token := self.headers.get("Authorization"):
            self.served.tokens.add(token.removeprefix("Bearer "))
        model = r"/api/models/((?:[^/]+/)?[^/]+?)(/revision/(.+)|/tree/.+)?"
        if match := re.fullmatch(model, path):
            self._api(match[1], match[3], tree="/tree/" in path)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[3], body)
        else:
            self._send(404, b"")

    def _api(self, repo: str, revision: str | None, tree: bool) -> None:
        if repo not in self.served.repos:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if repo in self.served.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        if revision not in (None, "main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = self.served.repos[repo]
        if tree:
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(name, data)}
                for name, data in files.items()
            ]
            return self._send(200, json.dumps(listing).encode())
        info = {
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "siblings": [self._sibling(name, data) for name, data in files.items()],
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "private": False,
        }
        return self._send(200, json.dumps(info).encode())

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        told = {"rfilename": name, "size": len(data), "blobId": _etag(name, data)}
        if name.endswith(".safetensors"):
            size = self.served.sizes.get(name, len(data))
            lfs = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 128}
            told |= {"size": size, "lfs": lfs}
        return told

    def _file(self, repo: str, name: str, body: bool) -> None:
        data = self.served.repos.get(repo, {}).get(name)
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{_etag(name, data)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if not body:
            return self._send(200, data, headers, body=False)
        start, status = 0, 200
        if wanted := self.headers.get("Range"):
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        part = data[start:]
        if self.served.breaks.get(name, 0) > 0:
            self.served.breaks[name] -= 1
            self.close_connection = True
            return self._send(status, part[: len(part) // 2], headers, length=len(part))
        return self._send(status, part, headers)

    def _send(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        body: bool = True,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(data)


def _etag(name: str, data: bytes) -> str:
    """Weights have their checksum, other files the name that git gives them."""
    kind = "sha256" if name.endswith(".safetensors") else "sha1"
    return hashlib.new(kind, data).hexdigest()
