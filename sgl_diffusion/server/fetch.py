"""Reading a URL that a client named, without becoming the client's way into our network.

The URL is parsed once, its name is resolved once, every address must be public, and the vetted
address itself is dialled; so is each redirect. What a caller learns is the class of the reason:
never an address, a status or a body of the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.addresses import is_public
from sgl_diffusion.server.wire import Answer, AnswerError, TooLargeError, exchange

Resolver = Callable[[str, int], list[str]]

_PORTS = {"http": 80, "https": 443}
_MAX_URL = 8_192
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, kw_only=True)
class FetchRules:
    """`hosts` are names, or NAME:PORT, that may be private; modes: public, listed, off."""

    mode: str = "public"
    hosts: frozenset[str] = frozenset()
    resolve_seconds: float = 2.0
    connect_seconds: float = 5.0
    total_seconds: float = 30.0
    min_bytes_per_second: int = 10_000
    redirects: int = 3


def system_resolver(host: str, port: int) -> list[str]:
    """Every address of `host`. Blocks: run it in a thread."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class _Target:
    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"


class Fetcher:
    """`resolver` stands for the name service; a test gives its own."""

    def __init__(self, rules: FetchRules, resolver: Resolver = system_resolver) -> None:
        self.rules = rules
        self._resolver = resolver
        # Its own threads: a name server that hangs must not block anything else.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="resolve")
        self._tls = ssl.create_default_context()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, *, max_bytes: int, param: str) -> bytes:
        """The body behind `url`, or a RequestError that blames `param`."""
        if self.rules.mode == "off":
            raise RequestError(
                "This server reads no URLs.",
                hint="Send the file itself, or a data URL.",
                code="url_not_allowed",
                param=param,
            )
        try:
            async with asyncio.timeout(self.rules.total_seconds):
                return await self._follow(url, max_bytes, param)
        except TimeoutError:
            raise _failed("it did not answer in time", param) from None

    async def _follow(self, url: str, max_bytes: int, param: str) -> bytes:
        former: _Target | None = None
        for _ in range(self.rules.redirects + 1):
            target = self._parse(url, param)
            if former is not None and former.scheme == "https" and target.scheme == "http":
                raise _refused("redirects from https to http", param)
            answer = await self._get(target, max_bytes, param)
            if answer.status not in _REDIRECTS:
                if answer.status != 200:
                    raise _failed("its server does not give it out", param)
                return answer.body
            if not answer.location:
                raise _refused("redirects to nowhere", param)
            former, url = target, urljoin(url, answer.location)
        raise RequestError(
            f"The URL redirects more than {self.rules.redirects} times.",
            code="too_many_redirects",
            param=param,
        )

    def _parse(self, url: str, param: str) -> _Target:
        if len(url) > _MAX_URL or any(c <= " " or c in "\\\x7f" for c in url):
            raise _refused("is not a plain URL", param)
        try:
            parts = urlsplit(url)
            port = parts.port
            host = (parts.hostname or "").rstrip(".").encode("idna" if parts.hostname else "ascii")
        except (ValueError, UnicodeError):
            raise _refused("is not a plain URL", param) from None
        if parts.scheme not in _PORTS:
            raise RequestError(
                "Only http and https URLs are read.",
                code="unsupported_url_scheme",
                param=param,
            )
        name = host.decode("ascii").lower()
        if not name:
            raise _refused("names no host", param)
        if parts.username is not None or parts.password is not None:
            raise _refused("holds a user name or password", param)
        if port is None:
            port = _PORTS[parts.scheme]
        elif port not in _PORTS.values() and f"{name}:{port}" not in self.rules.hosts:
            raise _refused("names another port than 80 or 443", param)
        return _Target(parts.scheme, name, port, _path(parts))

    async def _get(self, target: _Target, max_bytes: int, param: str) -> Answer:
        address = await self._vetted(target, param)
        secure = target.scheme == "https"
        try:
            async with asyncio.timeout(self.rules.connect_seconds):
                reader, writer = await asyncio.open_connection(
                    address,
                    target.port,
                    ssl=self._tls if secure else None,
                    server_hostname=target.host if secure else None,
                )
        except (OSError, TimeoutError, ssl.CertificateError):
            raise _failed("no connection can be made", param) from None
        try:
            return await exchange(
                reader,
                writer,
                target.authority,
                target.path,
                max_bytes=max_bytes,
                min_rate=self.rules.min_bytes_per_second,
            )
        except TooLargeError:
            raise RequestError(
                f"The file is larger than {max_bytes // 2**20} MB.",
                code="file_too_large",
                param=param,
            ) from None
        except (AnswerError, OSError):
            raise _failed("its server does not answer as it should", param) from None
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                writer.transport.abort()

    async def _vetted(self, target: _Target, param: str) -> str:
        """The one address that is dialled, after all addresses of the name have passed."""
        listed = bool({target.host, f"{target.host}:{target.port}"} & self.rules.hosts)
        if self.rules.mode == "listed" and not listed:
            raise _refused("is on no list of allowed hosts", param)
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, self._resolver, target.host, target.port
        )
        try:
            async with asyncio.timeout(self.rules.resolve_seconds):
                addresses = await work
        except (OSError, TimeoutError, UnicodeError):
            raise _failed("its host has no address", param) from None
        if not addresses:
            raise _failed("its host has no address", param)
        if not listed and not all(map(is_public, addresses)):
            raise _refused("points to a private or special address", param)
        return addresses[0]


def _path(parts: SplitResult) -> str:
    safe = "/%:@!$&'()*+,;=~-._?[]"
    query = f"?{quote(parts.query, safe=safe)}" if parts.query else ""
    return quote(parts.path or "/", safe=safe) + query


def _refused(why: str, param: str) -> RequestError:
    return RequestError(
        f"The URL {why}.",
        hint="The operator can allow hosts with --allow-media-host NAME.",
        code="url_not_allowed",
        param=param,
    )


def _failed(why: str, param: str) -> RequestError:
    return RequestError(
        f"The URL cannot be read: {why}.",
        hint="Send the file itself, or a data URL.",
        code="url_not_readable",
        param=param,
    )
