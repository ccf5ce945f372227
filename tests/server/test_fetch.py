"""The URL guard against real sockets on loopback, with a name service of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server import wire
from sgl_diffusion.server.fetch import Fetcher, FetchRules


def run(url: str, *, answers=(), names=None, max_bytes=2**20, hosts=("site.test",), **rules):
    """Fetch `url` from a server that gives `answers` one after the other; what it got, too."""
    seen: list[bytes] = []
    waiting = list(answers)
    table = {"site.test": ["127.0.0.1"], "other.test": ["127.0.0.1"], **(names or {})}

    tasks: list[asyncio.Task] = []

    async def serve(reader, writer):
        tasks.append(asyncio.current_task())
        with contextlib.suppress(OSError):
            try:
                seen.append(await reader.readuntil(b"\r\n\r\n"))
                answer = waiting.pop(0)
                if isinstance(answer, bytes):
                    writer.write(answer)
                else:
                    await answer(reader, writer)
                await writer.drain()
            finally:
                writer.close()
                await writer.wait_closed()

    async def inside():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        waiting[:] = [
            a.replace(b"PORT", b"%d" % port) if isinstance(a, bytes) else a for a in waiting
        ]
        allowed = {f"{host}:{port}" for host in hosts}
        fetcher = Fetcher(FetchRules(hosts=frozenset(allowed), **rules), resolver(table))
        try:
            return await fetcher.fetch(
                url.replace("PORT", str(port)), max_bytes=max_bytes, param="image"
            )
        finally:
            fetcher.close()
            server.close()
            await asyncio.gather(*tasks)

    try:
        return asyncio.run(inside()), seen
    except RequestError as error:
        assert error.param == "image"
        return error.code, seen


def resolver(table: dict[str, list[str]]) -> Callable[[str, int], list[str]]:
    def resolve(host: str, port: int) -> list[str]:
        if host not in table:
            raise OSError("no such name")
        return table[host]

    return resolve


def ok(body: bytes = b"hello", *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def to(where: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Moved\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode()


def test_reads_a_body_and_says_who_it_asks():
    body, seen = run("http://site.test:PORT/a b%20c?q=ü#part".replace(" ", "%20"), answers=[ok()])
    assert body == b"hello"
    head = seen[0].decode()
    assert head.startswith("GET /a%20b%20c?q=%C3%BC HTTP/1.1\r\nHost: site.test:")
    assert "Accept-Encoding: identity" in head and "Cookie" not in head
    assert "Authorization" not in head


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
    ],
)
def test_other_framings(answer):
    assert run("http://site.test:PORT/", answers=[answer])[0] == b"hello"


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "gopher://site.test/", "ftp://site.test/x", "//site.test/x", "x.png",
     "javascript:1", ""],
)  # fmt: skip
def test_schemes(url):
    assert run(url) == ("unsupported_url_scheme", [])


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:6379", "http://127.0.0.1/", "http://localhost/", "http://[::1]/",
     "http://0.0.0.0/", "http://169.254.169.254/latest", "http://10.0.0.1/", "http://100.64.0.1/",
     "http://[fd00:ec2::254]/", "http://168.63.129.16/", "http://[::ffff:127.0.0.1]/",
     "http://user:key@site.test:PORT/", "http://site.test:22/", "http://site.test:0/",
     "http://site.test:99999/", "http://site.test:x/", "http:///x", "http://[::1", "http://a b/",
     "http://site.test\\@evil.test/", "http://site.test/\r\nX: y", "http://2130706433/",
     "http://" + "a" * 9_000 + "/", "http://" + "a" * 64 + ".test/", "http://LOCALHOST./"],
)  # fmt: skip
def test_refused_before_anything_is_dialled(url):
    names = {name: [name] for name in (
        "127.0.0.1", "::1", "0.0.0.0", "169.254.169.254", "10.0.0.1", "100.64.0.1",
        "fd00:ec2::254", "168.63.129.16", "::ffff:127.0.0.1")}  # fmt: skip
    names |= {"localhost": ["127.0.0.1"], "2130706433": ["127.0.0.1"]}
    assert run(url, names=names) == ("url_not_allowed", [])


def test_every_address_of_a_name_must_pass():
    names = {"mixed.test": ["93.184.216.34", "10.0.0.1"]}
    assert run("http://mixed.test/", names=names)[0] == "url_not_allowed"
    assert run("http://nothing.test/", names=names)[0] == "url_not_readable"


def test_the_vetted_address_is_dialled_and_the_name_resolved_once(monkeypatch):
    """A name that is public when asked first and private when asked again."""
    asked, dialled = [], []

    async def connect(address, port, **options):
        dialled.append((address, port, options["server_hostname"]))
        raise OSError

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["93.184.216.34"] if len(asked) == 1 else ["127.0.0.1"]

    monkeypatch.setattr("asyncio.open_connection", connect)
    fetcher = Fetcher(FetchRules(), resolve)
    for code in ("url_not_readable", "url_not_allowed"):
        with pytest.raises(RequestError) as caught:
            asyncio.run(fetcher.fetch("https://moving.test/x", max_bytes=9, param="image"))
        assert caught.value.code == code
        assert "93.184" not in str(caught.value)
    fetcher.close()
    assert asked == ["moving.test"] * 2
    assert dialled == [("93.184.216.34", 443, "moving.test")]


def test_redirects_are_checked_again():
    hop, private = to("http://site.test:PORT/next"), to("http://other.test:80/")
    assert run("http://site.test:PORT/", answers=[hop, hop, hop, ok()])[0] == b"hello"
    assert run("http://site.test:PORT/", answers=[to("/next"), ok()])[0] == b"hello"
    assert run("http://site.test:PORT/", answers=[hop] * 5)[0] == "too_many_redirects"
    assert run("http://site.test:PORT/", answers=[private])[0] == "url_not_allowed"
    assert run("http://site.test:PORT/", answers=[to("")])[0] == "url_not_allowed"
    file = to("file:///etc/passwd")
    assert run("http://site.test:PORT/", answers=[file])[0] == "unsupported_url_scheme"


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"x" * 3_000),
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 3_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nbb8\r\n" + b"x" * 3_000,
    ],
)
def test_bytes_are_counted(answer):
    assert run("http://site.test:PORT/", answers=[answer], max_bytes=2_000)[0] == "file_too_large"


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 6\r\n\r\nsecret",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
        ok(b"x", "Content-Encoding: gzip"),
    ],
)
def test_strange_answers(answer):
    assert run("http://site.test:PORT/", answers=[answer])[0] == "url_not_readable"


def test_time_is_bounded(monkeypatch):
    async def never(reader, writer):
        await reader.read()  # until the one who asked has left

    async def drip(reader, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not reader.at_eof():
            writer.write(b"x")
            await asyncio.sleep(0.02)

    assert (
        run("http://site.test:PORT/", answers=[never], total_seconds=0.2)[0] == "url_not_readable"
    )
    monkeypatch.setattr(wire, "_GRACE_SECONDS", 0.1)
    assert run("http://site.test:PORT/", answers=[drip])[0] == "url_not_readable"


def test_a_slow_name_service_is_given_up():
    given_up = threading.Event()

    def hang(host: str, port: int) -> list[str]:
        assert given_up.wait(60)
        return ["93.184.216.34"]

    fetcher = Fetcher(FetchRules(resolve_seconds=0.1), hang)
    with pytest.raises(RequestError) as caught:
        asyncio.run(fetcher.fetch("http://slow.test/", max_bytes=9, param="image"))
    assert caught.value.code == "url_not_readable"
    given_up.set()
    fetcher.close()


def test_modes():
    assert run("http://site.test:PORT/", mode="off")[0] == "url_not_allowed"
    assert run("http://site.test:PORT/", answers=[ok()], mode="listed")[0] == b"hello"
    public = {"public.test": ["93.184.216.34"]}
    assert run("http://public.test/", names=public, mode="listed")[0] == "url_not_allowed"


def test_proxies_of_the_environment_are_ignored(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert run("http://site.test:PORT/", answers=[ok()])[0] == b"hello"
