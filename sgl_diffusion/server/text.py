"""Checks of single texts, wherever they come from."""

from __future__ import annotations

from sgl_diffusion.base.config import LimitOptions
from sgl_diffusion.base.errors import RequestError


def field_too_large(limits: LimitOptions, param: str | None) -> RequestError:
    return RequestError(
        f"A text is larger than {limits.max_field_kb} kB.",
        hint="The operator sets the limit with --max-field-kb.",
        code="body_too_large",
        param=param,
    )


def check_text(text: str, param: str | None) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(
            "A text holds half a surrogate pair.", code="invalid_unicode", param=param
        ) from None
