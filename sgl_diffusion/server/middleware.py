"""Plain ASGI wrappers around every request: request id, header guards, and the last safety net."""

from __future__ import annotations

import ipaddress
import re
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from logging import DEBUG, INFO
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.server.errors import internal_response, turn_away

log = get_logger(__name__)

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
# Pollers ask these all the time, and a change of their answer has a line of its own.
_PROBES = frozenset({"/livez", "/liveness", "/readyz", "/health"})
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass
class Notes:
    """What a route says beside its answer: fields of the log line, warnings for the client."""

    logged: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Outermost:
    """Gives answers `x-request-id` and `nosniff`, foreign exceptions one constant sentence, and
    the log one line per request. Routes leave notes for both in `request.state.notes`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        started, status, began = False, 0, time.monotonic()
        notes = Notes()
        scope.setdefault("state", {})["notes"] = notes

        async def send_marked(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                if notes.warnings:
                    headers["x-sgld-warning"] = "; ".join(notes.warnings)
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
        finally:
            quiet = scope["method"] in ("GET", "HEAD") and (
                status < 400 or (status == 503 and scope["path"] in _PROBES)
            )
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "ms": round((time.monotonic() - began) * 1000, 1),
                "key": getattr(scope["state"].get("caller"), "key_id", None),
                **notes.logged,
            }
            log.log(DEBUG if quiet else INFO, "request", extra={"fields": fields})


class HeaderGuard:
    """Refuses foreign `Host` names (DNS rebinding) and foreign `Origin`s (web pages elsewhere).

    `any_address` lets every numeric host pass: a server that listens on all interfaces has many,
    and a rebinding page cannot have one as its name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: frozenset[str],
        origins: frozenset[str],
        any_address: bool,
        rejected: Counter[str],
    ) -> None:
        self.app = app
        self.allowed = allowed_hosts | _LOOPBACK_NAMES
        self.origins = origins
        self.any_address = any_address
        self.rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check(headers.getlist("host"), headers.get("origin"))
            except RequestError as error:
                await turn_away(error, self.rejected)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, hosts: list[str], origin: str | None) -> None:
        if len(hosts) != 1:
            raise RequestError(
                "A request names this server in one Host header.",
                hint="For example `Host: localhost`.",
                code="host_not_allowed",
            )
        host, name = hosts[0], _hostname(hosts[0])
        if name not in self.allowed and not (self.any_address and _is_address(name)):
            raise RequestError(
                "This server has another name.",
                hint="The operator can add names with --allowed-hosts.",
                code="host_not_allowed",
            )
        if origin is not None and origin not in self.origins and _netloc(origin) != host.lower():
            raise RequestError(
                "Web pages of other origins may not call this server.",
                hint="The operator can allow some with --cors-origins.",
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


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
