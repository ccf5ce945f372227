"""Reading request bodies: capped while they stream, JSON to plain values. Forms: `forms.py`."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData

from sgl_diffusion.base.config import LimitOptions
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.forms import read_form
from sgl_diffusion.server.middleware import Notes
from sgl_diffusion.server.text import check_text, field_too_large

_LARGE = 2**18  # bytes of JSON that are parsed in a thread
_MAX_SEPARATORS = 200_000
_DEFAULTS = LimitOptions()
_FILES = frozenset({"messages.content.input_audio.data"})  # base64 without the head of a data URL


@dataclass(frozen=True)
class Body:
    """The fields of a request; from a form every value is text, a list, a dict or a file.

    `lenient` says what happens to unknown fields, `notes` goes into the log and the answer."""

    fields: dict[str, Any]
    form: FormData | None = None
    lenient: bool = False
    log_prompts: bool = False
    notes: Notes = field(default_factory=Notes)

    async def close(self) -> None:
        """Drop the temporary files of a form."""
        if self.form is not None:
            await self.form.close()


async def read_body(
    request: Request, *, form: bool, plain: bool = True, any_type: bool = False
) -> Body:
    """Read JSON where `plain`, or with `form` also multipart/form-data; with `any_type` JSON under
    any name."""
    settings = request.app.state.context.settings
    limits: LimitOptions = settings.limits
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise RequestError(
            "Compressed request bodies are not read.",
            hint="Send the body as it is.",
            code="unsupported_content_encoding",
        )
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    files = None
    if form and kind == "multipart/form-data":
        body = _stream(request, limits.max_form_mb, "form")
        fields, files = await read_form(request, body, limits)
    elif any_type or (plain and kind == "application/json"):
        data = b"".join([chunk async for chunk in _stream(request, limits.max_json_mb, "json")])
        fields = await _parse_aside(request, data, limits)
    else:
        accepted = ["application/json"] * plain + ["multipart/form-data"] * form
        raise RequestError(
            "The body has the wrong content type.",
            hint=f"Send {' or '.join(accepted)} and say so in the Content-Type header.",
            code="unsupported_media_type",
        )
    return Body(
        fields,
        files,
        settings.lenient,
        settings.log_prompts,
        request.state.notes,
    )


async def _stream(request: Request, limit_mb: int, kind: str) -> AsyncGenerator[bytes, None]:
    """The body in pieces; ends with an error as soon as it is larger than the limit."""
    limit = limit_mb * 2**20
    declared = request.headers.get("content-length", "")
    total = int(declared) if declared.isascii() and declared.isdigit() else 0
    received = 0
    too_large = RequestError(
        f"The body is larger than {limit_mb} MB.",
        hint=f"The operator sets the limit with --max-{kind}-mb.",
        code="body_too_large",
    )
    if total > limit:
        raise too_large
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise too_large
        yield chunk


async def _parse_aside(request: Request, data: bytes, limits: LimitOptions) -> dict[str, Any]:
    """Large bodies are parsed in a thread: others must not wait for them."""
    if len(data) < _LARGE:
        return parse_json(data, limits)
    work = partial(parse_json, data, limits)
    result: dict[str, Any] = await request.app.state.context.in_thread(work)
    return result


def parse_json(data: bytes | str, limits: LimitOptions = _DEFAULTS) -> dict[str, Any]:
    separators = data.count(b",") if isinstance(data, bytes) else data.count(",")
    if separators > _MAX_SEPARATORS:  # small values cost a hundred times their text as objects
        raise RequestError("The JSON holds too many values.", code="out_of_range")
    try:
        value = json.loads(data)
    except RecursionError:
        raise RequestError("The JSON is nested too deeply.", code="json_too_deep") from None
    except json.JSONDecodeError as error:
        where = f"It breaks at line {error.lineno}, column {error.colno}."
        raise RequestError("The body is not valid JSON.", hint=where, code="invalid_json") from None
    except UnicodeDecodeError:
        raise RequestError("The body is not UTF-8 text.", code="invalid_json") from None
    except ValueError:  # a number of thousands of digits
        raise RequestError("The body is not valid JSON.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", code="body_not_object")
    _check_values(value, limits)
    return value


def _check_values(root: dict[str, Any], limits: LimitOptions) -> None:
    """Refuse what JSON can say and we cannot use: depth, endless numbers, broken unicode."""
    stack: list[tuple[Any, str, int]] = [(root, "", 1)]
    while stack:
        value, path, depth = stack.pop()
        if isinstance(value, dict | list):
            if depth > limits.max_json_depth:
                raise RequestError(
                    f"The JSON is nested more than {limits.max_json_depth} deep.",
                    hint="The operator sets the limit with --max-json-depth.",
                    code="json_too_deep",
                )
            if len(value) > limits.max_json_items:
                raise RequestError(
                    f"A list or object has more than {limits.max_json_items} items.",
                    hint="The operator sets the limit with --max-json-items.",
                    code="out_of_range",
                    param=path or None,
                )
            if isinstance(value, dict):
                for key, child in value.items():
                    check_text(key, None)
                    stack.append((child, f"{path}.{key}".lstrip("."), depth + 1))
            else:
                stack.extend((child, path, depth + 1) for child in value)
        elif isinstance(value, str):
            check_text(value, path)
            file = value[:5].lower() == "data:" or path in _FILES
            if len(value) > limits.max_field_kb * 1024 and not file:
                raise field_too_large(limits, path)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError("Not a finite number.", code="not_finite", param=path)
