"""Plain ASGI wrappers around every request: request id, header guards, and the last safety net."""

from __future__ import annotations

import ipaddress
import re
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.server.errors import internal_response, to_response

log = get_logger(__name__)

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Outermost:
    """Gives answers `x-request-id` and `nosniff`, and foreign exceptions one constant sentence."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, send_marked)
        except ClientDisconnect:
            log.info("request %s: the client left while it sent its body", request_id)
        except Exception:
            log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if started:
                raise  # the server must cut the connection: half an answer is no answer
            await internal_response()(scope, receive, send_marked)


class HeaderGuard:
    """Refuses foreign `Host` names (DNS rebinding) and foreign `Origin`s (web pages elsewhere)."""

    def __init__(self, app: ASGIApp, allowed_hosts: frozenset[str]) -> None:
        self.app = app
        self.allowed = allowed_hosts | _LOOPBACK_NAMES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check(headers.get("host", ""), headers.get("origin"))
            except RequestError as error:
                await to_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, host: str, origin: str | None) -> None:
        if _hostname(host) not in self.allowed:
            raise RequestError("This server has another name.", code="host_not_allowed")
        if origin is not None and _netloc(origin) != host.lower():
            raise RequestError(
                "Web pages of other origins may not call this server.",
                code="origin_not_allowed",
            )


def _hostname(netloc: str) -> str:
    try:
        return (urlsplit(f"//{netloc}").hostname or "").lower()
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
