"""The page at `/`: a playground of a few static files, made to work without any other server."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_FILES = (
    *("index.html", "style.css", "main.js"),
    *("api.js", "gallery.js", "paint.js", "request.js"),
)
PATHS = frozenset({"/", *(f"/playground/{name}" for name in _FILES[1:])})
# Only what this server sends, and pictures that the page made or was given.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' data: blob:; "
    "img-src 'self' data: blob:; media-src 'self' blob:; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    return _send(request, _FILES[0])


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def part(request: Request, name: str) -> Response:
    if name not in _FILES[1:]:
        raise HTTPException(404)
    return _send(request, name)


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
