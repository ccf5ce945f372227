"""Reading multipart/form-data: as the OpenAI SDK and curl send it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData

from sgl_diffusion.base.config import LimitOptions
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.text import check_text, field_too_large

_MAX_BOUNDARY = 70  # RFC 2046
_LISTS = frozenset({"image", "url"})  # several may come, with or without brackets


async def read_form(
    request: Request, body: AsyncGenerator[bytes, None], limits: LimitOptions
) -> tuple[dict[str, Any], FormData]:
    """Fields of a multipart body: text, list of texts for `name[]`, or an uploaded
    file. Files larger than a megabyte go to disk while they stream."""
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
        async for chunk in body:
            tail = (tail + chunk)[-4096:]
            yield chunk

    parser = MultiPartParser(
        request.headers,
        counted(),
        max_files=limits.max_files,
        max_fields=limits.max_fields,
        max_part_size=limits.max_field_kb * 1024,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise _explain(error.message, limits) or broken from None
    except (FormParserError, ValueError, LookupError):
        raise broken from None
    # The parser forgets a part that was cut off; the caller must not get a job without it.
    if closing not in tail:
        await form.close()
        raise broken
    try:
        return _collect(form), form
    except RequestError:
        await form.close()
        raise


def _explain(message: str, limits: LimitOptions) -> RequestError | None:
    """Our error for a limit that the parser met; None for a body that cannot be read."""
    if message.startswith("Part exceeded"):
        return field_too_large(limits, None)
    for what in ("files", "fields"):
        if message.startswith(f"Too many {what}"):
            return RequestError(
                f"The form has more than {getattr(limits, f'max_{what}')} {what}.",
                hint=f"The operator sets the limit with --max-{what}.",
                code="too_many_parts",
            )
    return None


def _collect(form: FormData) -> dict[str, Any]:
    """`a` is a value, `a[]` an item of a list, `a[b]` of a dict: as the OpenAI SDK sends."""
    fields: dict[str, Any] = {}
    for key, value in form.multi_items():
        name, _, inner = key.partition("[")
        inner = inner.removesuffix("]")
        check_text(name, None)
        if isinstance(value, str):
            check_text(value, name)
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
            raise RequestError(
                f"{name[:64]} is given twice.", code="invalid_value", param=name[:64]
            )
    return fields


def _parameter(content_type: str, wanted: str) -> str:
    for parameter in content_type.split(";")[1:]:
        name, _, value = parameter.strip().partition("=")
        if name.lower() == wanted:
            return value.strip('"')
    return ""
