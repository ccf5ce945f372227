"""Limits below HTTP, over a real socket: headers, time, number of connections."""

from __future__ import annotations

import dataclasses
import json
import re
import select
import socket
import time
from contextlib import ExitStack, closing

import pytest

from sgl_diffusion.base.config import LimitOptions
from tests.server.conftest import listening

LIMITS = LimitOptions(max_connections=4, max_header_kb=8, max_headers=20)
HASTY = dataclasses.replace(LIMITS, header_timeout=0.4, body_timeout=0.4)


@pytest.fixture
def address(make_api):
    with listening(make_api(limits=LIMITS)) as url:
        yield ("127.0.0.1", int(url.rpartition(":")[2]))


@pytest.fixture
def hasty(make_api):
    with listening(make_api(limits=HASTY)) as url:
        yield ("127.0.0.1", int(url.rpartition(":")[2]))


def connect(address) -> closing[socket.socket]:
    return closing(socket.create_connection(address, timeout=15))


def talk(address, *parts: bytes, pause: float = 0.0) -> tuple[int, dict]:
    """Send `parts`, read to the end: status and JSON body; (0, {}) for a closed connection."""
    with connect(address) as connection:
        for part in parts:
            connection.sendall(part)
            if select.select([connection], [], [], pause)[0]:
                break  # answered; whoever sends on may find nobody there
        data = to_the_end(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)) if head else (0, {})


def to_the_end(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65_536):
        data += chunk
    return data


def one_answer(connection: socket.socket) -> bytes:
    """Head and body of one answer that says how long it is; nothing of a second may follow."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    assert length, head
    while len(body) < int(length[1]):
        body += received(connection)
    assert len(body) == int(length[1])
    return head + b"\r\n\r\n" + body


def received(connection: socket.socket) -> bytes:
    data = connection.recv(65_536)
    assert data, "the connection ended"
    return data


def head(*lines: str, end: str = "\r\n\r\n") -> bytes:
    return "\r\n".join([*lines]).encode("latin-1") + end.encode()


def code(answer: tuple[int, dict]) -> tuple[int, str]:
    assert set(answer[1]) == {"error", "detail"}
    return answer[0], answer[1]["error"]["code"]


HOST = "Host: 127.0.0.1"


@pytest.mark.parametrize(
    "request_head",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40,
        head("GET /livez HTTP/1.1", HOST, "Content-Length: 5", "Content-Length: 6"),
        head("GET /livez HTTP/1.1", HOST, "Content-Length: 5", "Transfer-Encoding: chunked"),
        head("GET /livez HTTP/1.1", HOST, "Content-Length: -1"),
        head("GET /livez HTTP/1.1", HOST, "Bad Header: 1"),
        head("GET /livez\x01 HTTP/1.1", HOST),
        head("POST /livez HTTP/1.1", HOST, "Transfer-Encoding: chunked") + b"zz\r\n",
        head("GET /" + "a" * 70_000 + " HTTP/1.1", HOST),
    ],
)  # fmt: skip
def test_what_is_no_http(address, request_head):
    status, body = talk(address, request_head)
    assert status in (400, 431)
    assert body["error"]["code"] in ("invalid_http", "headers_too_large")


def test_what_never_became_a_request_is_counted_and_logged_once(make_api, caplog):
    api = make_api(limits=LIMITS)
    caplog.set_level("INFO", logger="sgl_diffusion")
    with listening(api) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        talk(address, b"nonsense\r\n\r\n")
        talk(address, head("GET /livez HTTP/1.1", HOST, "X: " + "a" * 9_000))
        upgrade = head("GET /livez HTTP/1.1", HOST, "Upgrade: websocket", "Connection: upgrade")
        with connect(address) as connection:
            connection.sendall(upgrade)
            assert one_answer(connection).startswith(b"HTTP/1.1 200")  # who asks may go on in HTTP
    assert api.context.rejected == {"invalid_http": 1, "headers_too_large": 1}
    told = [record.fields["code"] for record in caplog.records if record.message == "no request"]
    assert told == ["invalid_http", "headers_too_large"]
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_header_bytes_and_count(address):
    many = [f"X-{i}: 1" for i in range(40)]
    assert code(talk(address, head("GET /livez HTTP/1.1", HOST, *many))) == (
        431,
        "too_many_headers",
    )
    long = head("GET /livez HTTP/1.1", HOST, "X: " + "a" * 9_000)
    assert code(talk(address, long)) == (431, "headers_too_large")
    endless = head("GET /livez HTTP/1.1", HOST, "X: " + "a" * 400_000, end="")
    assert code(talk(address, endless)) == (431, "headers_too_large")


def test_headers_have_a_deadline(hasty):
    assert code(talk(hasty, b"GET /livez HTTP/1.1\r\nHos")) == (400, "headers_too_slow")
    assert talk(hasty) == (0, {})
    drip = [b"G", b"E", b"T", b" ", *[b"/"] * 50]  # every byte is new, the deadline is not
    assert code(talk(hasty, *drip, pause=0.1))[1] == "headers_too_slow"


def test_the_second_request_of_a_connection_has_one_too(hasty):
    with connect(hasty) as connection:
        connection.sendall(head("GET /livez HTTP/1.1", HOST))
        assert one_answer(connection).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /livez HT")
        assert b"headers_too_slow" in to_the_end(connection)


def test_a_body_that_pauses(hasty):
    post = head("POST /v1/images/generations HTTP/1.1", HOST, "Content-Type: application/json",
                "Content-Length: 100", "Connection: close")  # fmt: skip
    assert code(talk(hasty, post, b'{"prompt"')) == (400, "body_too_slow")


def test_slow_clients_do_not_keep_others_out(make_api):
    limits = dataclasses.replace(LIMITS, header_timeout=4.0)
    with listening(make_api(limits=limits)) as url, ExitStack() as stack:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        slow = [stack.enter_context(connect(address)) for _ in range(4)]
        get = head("GET /livez HTTP/1.1", HOST, "Connection: close")
        assert code(talk(address, get)) == (503, "too_many_connections")
        for connection in slow:  # their headers did not come in time
            assert to_the_end(connection) == b""
        assert talk(address, get)[0] == 200


def test_pipelined_requests_and_keep_alive(address):
    get = head("GET /livez HTTP/1.1", HOST)
    with connect(address) as connection:
        connection.sendall(get * 3)
        data = b""
        while data.count(b"HTTP/1.1 200") < 3:
            data += received(connection)


def test_a_body_nobody_reads_ends_the_connection(address):
    post = head("POST /nothing HTTP/1.1", HOST, "Content-Length: 100000000")
    with connect(address) as connection:
        connection.sendall(post)
        assert b"HTTP/1.1 404" in one_answer(connection)
        deadline = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                connection.sendall(b"x" * 65_536)
                time.sleep(0.01)
