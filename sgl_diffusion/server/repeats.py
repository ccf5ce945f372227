"""Recognising a request that was sent before: Idempotency-Key, and retries of the OpenAI SDK."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.admission import ANYBODY
from sgl_diffusion.server.body import Body

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_CHUNK = 2**20


@dataclass(frozen=True)
class Origin:
    """Where a request comes from: whose it is, and what makes it the same as another one."""

    owner: str
    key: str | None
    retried: bool
    body_hash: str

    @property
    def repeatable(self) -> bool:
        """Whether an earlier request may be this one."""
        return self.key is not None or self.retried


def owner_of(request: Request) -> str:
    """The id of the caller's API key; everybody is one caller where there are no keys."""
    caller = getattr(request.state, "caller", None)
    return ANYBODY if caller is None else str(caller.key_id)


async def origin_of(request: Request, body: Body) -> Origin:
    """Read before the body is closed: the files of a form count, too."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise RequestError(
            "An Idempotency-Key is 1 to 255 printable ASCII characters without spaces.",
            param="Idempotency-Key",
        )
    count = request.headers.get("x-stainless-retry-count", "")
    retried = count.isascii() and count.isdigit() and len(count) < 9 and int(count) > 0
    digest = hashlib.sha256(request.url.path.encode())
    canonical = json.dumps(await _plain(body.fields), sort_keys=True, separators=(",", ":"))
    digest.update(canonical.encode())
    return Origin(owner_of(request), key, retried, digest.hexdigest())


async def _plain(value: Any) -> Any:
    """The same value with every file as the digest of its content."""
    if isinstance(value, dict):
        return {key: await _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [await _plain(item) for item in value]
    if isinstance(value, UploadFile):
        digest = hashlib.sha256()
        while chunk := await value.read(_CHUNK):
            digest.update(chunk)
        await value.seek(0)
        return {"sha256": digest.hexdigest()}
    return value
