"""Pages of a few static files, made to work without any other server."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
# Only what this server sends, and what the page made or was given.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' data: blob:; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class StaticPage:
    """`index` is the page at `/`; it asks for the files under `place`."""

    place: str
    index: str
    files: tuple[str, ...]

    @property
    def paths(self) -> frozenset[str]:
        return frozenset({"/", *(f"{self.place}/{name}" for name in self.files)})

    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)

        @router.api_route("/", methods=["GET", "HEAD"])
        async def page(request: Request) -> Response:
            return _send(request, self.index)

        @router.api_route(self.place + "/{name}", methods=["GET", "HEAD"])
        async def part(request: Request, name: str) -> Response:
            if name not in self.files:
                raise HTTPException(404)
            return _send(request, name)

        return router


def _send(request: Request, name: str) -> Response:
    data, tag = _read(name)
    headers = {
        "etag": tag,
        "cache-control": "no-cache",
        "content-security-policy": _POLICY,
        "referrer-policy": "no-referrer",
    }
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    kind = _TYPES[name.rpartition(".")[2]]
    return Response(data, headers=headers, media_type=f"{kind}; charset=utf-8")


@cache
def _read(name: str) -> tuple[bytes, str]:
    data = (resources.files("sgl_diffusion.server") / "static" / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'
