"""Reading request bodies: capped while they stream, JSON and multipart to plain values."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData

from sgl_diffusion.base.errors import RequestError

MAX_JSON_BYTES = 64 * 2**20
MAX_FORM_BYTES = 600 * 2**20
MAX_FIELD_BYTES = 2**20
MAX_FIELDS = 100
MAX_FILES = 20
MAX_DEPTH = 64
MAX_ITEMS = 10_000
_MAX_BOUNDARY = 70  # RFC 2046
_LISTS = frozenset({"image", "url"})  # several may come, with or without brackets


@dataclass(frozen=True)
class Body:
    """The fields of a request; from a form every value is text, a list, a dict or a file."""

    fields: dict[str, Any]
    form: FormData | None = None

    async def close(self) -> None:
        """Drop the temporary files of a form."""
        if self.form is not None:
            await self.form.close()


async def read_body(request: Request, *, form: bool) -> Body:
    """Read JSON, or with `form` also multipart/form-data."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise RequestError(
            "Compressed request bodies are not read.",
            code="unsupported_content_encoding",
        )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Body(parse_json(await _read_all(request)))
    if form and kind == "multipart/form-data":
        return await _read_form(request)
    accepted = "application/json or multipart/form-data" if form else "application/json"
    raise RequestError(
        "The body has the wrong content type.",
        hint=f"Send {accepted} and say so in the Content-Type header.",
        code="unsupported_media_type",
    )


async def _stream(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body in pieces; ends with an error as soon as it is larger than `limit`."""
    declared = request.headers.get("content-length", "")
    total = int(declared) if declared.isascii() and declared.isdigit() else 0
    received = 0
    too_large = RequestError(f"The body is larger than {limit // 2**20} MB.", code="body_too_large")
    if total > limit:
        raise too_large
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise too_large
        yield chunk


async def _read_all(request: Request) -> bytes:
    return b"".join([chunk async for chunk in _stream(request, MAX_JSON_BYTES)])


def parse_json(data: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except RecursionError:
        raise RequestError("The JSON is nested too deeply.", code="json_too_deep") from None
    except ValueError:
        raise RequestError("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="body_not_object")
    _check_values(value)
    return value


def _check_values(root: dict[str, Any]) -> None:
    """Refuse what JSON can say and we cannot use: depth, endless numbers, broken unicode."""
    stack: list[tuple[Any, str, int]] = [(root, "", 1)]
    while stack:
        value, path, depth = stack.pop()
        if isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise RequestError(
                    f"The JSON is nested more than {MAX_DEPTH} deep.",
                    code="json_too_deep",
                )
            if len(value) > MAX_ITEMS:
                raise RequestError(
                    f"A list or object has more than {MAX_ITEMS} items.",
                    code="out_of_range",
                    param=path or None,
                )
            if isinstance(value, dict):
                for key, child in value.items():
                    _check_text(key, None)
                    stack.append((child, f"{path}.{key}".lstrip("."), depth + 1))
            else:
                stack.extend((child, path, depth + 1) for child in value)
        elif isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError("Not a finite number.", code="not_finite", param=path)


def _check_text(text: str, param: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(
            "A text holds half a surrogate pair.", code="invalid_unicode", param=param
        ) from None


async def _read_form(request: Request) -> Body:
    """Fields of a multipart body: text, list of texts for `name[]`, or an uploaded file."""
    from python_multipart.exceptions import FormParserError
    from starlette.formparsers import MultiPartException, MultiPartParser

    broken = RequestError(
        "The multipart body cannot be read.",
        hint="It needs UTF-8 text, a boundary, and the closing boundary at its end.",
        code="invalid_multipart",
    )
    content_type = request.headers.get("content-type", "")
    boundary = _parameter(content_type, "boundary")
    charset = _parameter(content_type, "charset") or "utf-8"
    if not 0 < len(boundary) <= _MAX_BOUNDARY or charset.lower() != "utf-8":
        raise broken
    closing = f"--{boundary}--".encode("latin-1")
    tail = b""

    async def counted() -> AsyncGenerator[bytes, None]:
        nonlocal tail
        async for chunk in _stream(request, MAX_FORM_BYTES):
            tail = (tail + chunk)[-4096:]
            yield chunk

    parser = MultiPartParser(
        request.headers,
        counted(),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError, ValueError, LookupError):
        raise broken from None
    # The parser forgets a part that was cut off; the caller must not get a job without it.
    if closing not in tail:
        await form.close()
        raise broken
    try:
        return Body(_collect(form), form)
    except RequestError:
        await form.close()
        raise


def _collect(form: FormData) -> dict[str, Any]:
    """`a` is a value, `a[]` an item of a list, `a[b]` of a dict: as the OpenAI SDK sends."""
    fields: dict[str, Any] = {}
    for key, value in form.multi_items():
        name, _, inner = key.partition("[")
        inner = inner.removesuffix("]")
        _check_text(name, None)
        if isinstance(value, str):
            _check_text(value, name)
        if name in _LISTS and not inner:
            fields.setdefault(name, []).append(value)
            continue
        if "[" not in key:
            clash = name in fields
            fields[name] = value
        elif inner:
            items = fields.setdefault(name, {})
            clash = not isinstance(items, dict) or inner in items
            if not clash:
                items[inner] = value
        else:
            items = fields.setdefault(name, [])
            clash = not isinstance(items, list)
            if not clash:
                items.append(value)
        if clash:
            raise RequestError(f"{name[:64]} is given twice.", code="invalid_value")
    return fields


def _parameter(content_type: str, wanted: str) -> str:
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.strip().partition("=")
        if name.lower() == wanted:
            return value.strip('"')
    return ""
