"""The one place where errors become HTTP: status, envelope, headers.

Every error body is `{"error": {message, type, param, code}, "detail": message}`. A text reaches a
client only from our own error classes; anything else is a constant sentence, and the log has more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Route
from starlette.types import Scope

from sgl_diffusion.base import errors
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.registry import suggest

log = get_logger(__name__)

INTERNAL = "The server met an internal error. Its log holds the details under this request id."

# The most specific class comes first.
STATUS: tuple[tuple[type[errors.SglError], int], ...] = (
    (errors.RequestError, 400),
    (errors.NotFoundError, 404),
    (errors.ConflictError, 409),
    (errors.BusyError, 429),
    (errors.UnavailableError, 503),
    (errors.CancelledError, 503),
    (errors.WorkerLostError, 503),
    (errors.SetupError, 503),
    (errors.SglError, 500),
)
# Requests that are wrong in a way HTTP has its own number for.
STATUS_BY_CODE = {
    "missing_api_key": 401,
    "invalid_api_key": 401,
    "admin_key_required": 403,
    "host_not_allowed": 403,
    "origin_not_allowed": 403,
    "model_not_deletable": 403,
    "method_not_allowed": 405,
    "body_too_large": 413,
    "file_too_large": 413,
    "unsupported_media_type": 415,
    "unsupported_content_encoding": 415,
    "deadline_exceeded": 503,
}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
# Where the next part of the path is an id.
_KINDS = {"/v1/videos": "video", "/v1/images": "image"}
# What counts as turned away at the door, in the metrics.
_REJECTIONS = {400, 401, 403, 413, 415, 429, 431, 503}
# Clients that retry by status would only repeat work whose outcome is known.
NO_RETRY = {"out_of_memory", "deadline_exceeded", "insufficient_storage"}


def status_of(error: errors.SglError) -> int:
    by_class = next(status for kind, status in STATUS if isinstance(error, kind))
    return STATUS_BY_CODE.get(error.code, by_class)


def envelope(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    fields = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": fields, "detail": message}


def to_response(error: errors.SglError) -> JSONResponse:
    """The answer to a request that failed with `error`."""
    status = status_of(error)
    headers = {}
    if status == 409 or error.code in NO_RETRY:
        headers["x-should-retry"] = "false"
    elif status in (429, 503):
        # Above 120 s the OpenAI SDK gives up instead of waiting.
        headers["retry-after"] = str(min(max(getattr(error, "retry_after", 5), 1), 110))
    body = envelope(status, str(error), error.code, error.param)
    return JSONResponse(body, status_code=status, headers=headers)


def internal_response() -> JSONResponse:
    return JSONResponse(envelope(500, INTERNAL, "internal_error"), status_code=500)


def turn_away(error: errors.SglError, rejected: Counter[str]) -> JSONResponse:
    """The answer to a request that failed with `error`, and its place in the metrics."""
    if status_of(error) in _REJECTIONS:
        rejected[error.code] += 1
    return to_response(error)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.SglError)
    if status_of(error) >= 500:
        log.warning("%s: %s", type(error).__name__, error)
    return turn_away(error, request.app.state.context.rejected)


async def _http(request: Request, error: Exception) -> JSONResponse:
    """Errors the framework raises itself: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return to_response(_no_route(request))
    if error.status_code == 405:
        allowed = ", ".join(allowed_methods(request.app.state.routes, request.scope))
        response = to_response(
            errors.RequestError(
                f"This route does not know {request.method}.",
                hint=f"Use {allowed}.",
                code="method_not_allowed",
            )
        )
        response.headers["allow"] = allowed
        return response
    log.error("unexpected HTTP error %d", error.status_code)
    return internal_response()


def allowed_methods(routes: Iterable[Route], scope: Scope) -> list[str]:
    """All that the path of a request knows: a method may have a route of its own. A fixed path is
    no id of the routes beside it."""
    found = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    fixed = [route for route in found if "{" not in route.path]
    return sorted({method for route in fixed or found for method in route.methods or ()})


def _no_route(request: Request) -> errors.NotFoundError:
    """For the framework an escaped slash ends a part of the path; for us it is in a wrong id."""
    parts = request.scope["raw_path"].decode("ascii", "replace").lower().split("/")
    kind = _KINDS.get("/".join(parts[:3]))
    if kind is not None and "%2f" in "".join(parts[3:4]):
        return not_found(kind)
    close = suggest(request.url.path, [route.path for route in request.app.state.routes])
    hint = close if close.startswith("Did") else "GET /openapi.json lists them."
    return errors.NotFoundError("There is no such route.", hint=hint)


def not_found(kind: str) -> errors.NotFoundError:
    """Of one video or image."""
    return errors.NotFoundError(
        f"There is no such {kind}.", code=f"{kind}_not_found", param=f"{kind}_id"
    )


async def _validation(request: Request, error: Exception) -> JSONResponse:
    """Path and query parameters; the input itself is never repeated."""
    assert isinstance(error, RequestValidationError)
    param = str(error.errors()[0]["loc"][-1])
    return await _ours(request, errors.RequestError(f"{param} cannot be read.", param=param))


def install(app: FastAPI, routes: Sequence[Route]) -> None:
    """`routes` are those of `app`, which has them inside its routers."""
    app.state.routes = routes
    app.add_exception_handler(errors.SglError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
