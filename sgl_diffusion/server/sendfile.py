"""A file as an answer: Range, HEAD, ETag and the conditions on it, as RFC 9110 has them.

The file is opened before the headers are sent: one that is deleted meanwhile is still sent whole.
Files never change under their name, so their size and time are a strong ETag.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import re
from pathlib import Path

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sgl_diffusion.server.errors import envelope

_CHUNK = 256 * 1024
_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.ASCII)


class _Open:
    """An open file. It closes when nobody holds it any more, a thread that reads it included."""

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.stat = os.fstat(self._number)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)

    def read(self, count: int, at: int) -> bytes:
        return os.pread(self._number, count, at)


async def file_response(request: Request, path: Path, media_type: str) -> Response:
    """The answer; FileNotFoundError when there is no such file."""
    file = await asyncio.to_thread(_Open, path)
    size = file.stat.st_size
    etag = f'"{size:x}-{file.stat.st_mtime_ns:x}"'
    modified = email.utils.formatdate(file.stat.st_mtime, usegmt=True)
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=3600",
        "etag": etag,
        "last-modified": modified,
    }
    if _unchanged(request.headers, etag, int(file.stat.st_mtime)):
        return Response(status_code=304, headers=headers)
    span = _span(request.headers, size, etag, modified)
    if span is None:
        return _unsatisfiable(size)
    start, end = span
    headers["content-disposition"] = f'inline; filename="{path.name}"'
    headers["content-length"] = str(end - start)
    if end - start == size:
        return _Sent(file, span, 200, headers, media_type)
    headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    return _Sent(file, span, 206, headers, media_type)


class _Sent(Response):
    """The bytes of `span` of a file."""

    def __init__(
        self, file: _Open, span: tuple[int, int], status: int, headers: dict[str, str], kind: str
    ) -> None:
        self.status_code, self.media_type, self.background = status, kind, None
        self._file, self._span = file, span
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        at, end = self._span if scope["method"] != "HEAD" else (0, 0)
        while at < end:
            # The disk may be slow; `send` waits for a reader that is.
            data = await asyncio.to_thread(self._file.read, min(_CHUNK, end - at), at)
            if not data:
                raise OSError("the file became shorter while it was sent")
            at += len(data)
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _unchanged(headers: Headers, etag: str, modified: int) -> bool:
    """Whether the client has this file already; If-None-Match makes If-Modified-Since mute."""
    tags = headers.get("if-none-match")
    if tags is not None:
        listed = [tag.strip().removeprefix("W/") for tag in tags.split(",")]
        return etag in listed or "*" in listed
    since = _time(headers.get("if-modified-since"))
    return since is not None and modified <= since


def _time(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return int(email.utils.parsedate_to_datetime(text).timestamp())
    except (ValueError, OverflowError):
        return None


def _span(headers: Headers, size: int, etag: str, modified: str) -> tuple[int, int] | None:
    """Which bytes to send, None for 416. A header that cannot be read, or one that lists several
    ranges, asks for the whole file, which a server may always send."""
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or match.groups() == ("", ""):
        return 0, size
    if headers.get("if-range", etag) not in (etag, modified):
        return 0, size
    first, last = match.groups()
    if not first:  # the last so many bytes
        count = min(int(last), size)
        return (size - count, size) if count else None
    if last and int(last) < int(first):
        return 0, size
    if int(first) >= size:
        return None
    return int(first), min(int(last) + 1, size) if last else size


def _unsatisfiable(size: int) -> Response:
    body = envelope(416, f"The file has {size} bytes.", "range_not_satisfiable")
    return JSONResponse(body, status_code=416, headers={"content-range": f"bytes */{size}"})
