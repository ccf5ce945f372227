"""Taking a port."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from sgl_diffusion.base.errors import ConfigError, PortInUseError
from sgl_diffusion.server.middleware import is_loopback
from sgl_diffusion.server.ports import bind, find_owner


def test_a_free_port():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        assert find_owner(port)[0] == os.getpid()
    assert find_owner(port) is None


def test_a_taken_port_names_its_owner():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUseError) as raised:
            bind("127.0.0.1", port)
    assert str(os.getpid()) in str(raised.value) and f"--port {port + 1}" in str(raised.value)
    assert raised.value.exit_code == 98


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_only_loopback(host):
    with pytest.raises(ConfigError, match="Refusing to listen"):
        bind(host, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_names(host):
    assert is_loopback(host)


@pytest.mark.parametrize("port", [-1, 65_536])
def test_impossible_ports(port):
    with pytest.raises(ConfigError, match="0 to 65535"):
        bind("127.0.0.1", port)


def test_a_machine_without_ipv6_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "x")

    monkeypatch.setattr("sgl_diffusion.server.ports.socket.socket", none)
    with pytest.raises(ConfigError, match="Cannot listen on ::1:0: Address family not supported"):
        bind("::1", 0)


def test_other_machines_only_where_it_was_decided():
    with bind("0.0.0.0", 0, open_to_others=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
    with pytest.raises(ConfigError, match="no address"):
        bind("no-such-name.invalid", 0, open_to_others=True)
