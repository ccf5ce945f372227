"""Taking the port: before anything heavy starts, and with a useful text when somebody has it."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from sgl_diffusion.base.errors import ConfigError, PortInUseError
from sgl_diffusion.server.middleware import is_loopback

_LISTEN = "0A"


def bind(host: str, port: int, *, open_to_others: bool = False) -> socket.socket:
    """A bound socket; port 0 takes a free one. `open_to_others`: keys are checked, or somebody
    has said that none are needed."""
    if not is_loopback(host) and not open_to_others:
        raise ConfigError(
            f"Refusing to listen on {host} without a key.",
            hint="Use --api-key-file, or --insecure-no-auth if a proxy protects you.",
            param="host",
        )
    if not 0 <= port <= 65_535:
        raise ConfigError(f"port is {port}; it must be from 0 to 65535.", param="port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise ConfigError(f"There is no address {host!r} to listen on.", param="host") from None
    family, kind, protocol, _, address = found[0]
    try:
        server = socket.socket(family, kind, protocol)
    except OSError as error:  # no IPv6 here, or no descriptor left
        raise _explain(error, host, port) from None
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(address)
        server.listen(2048)
    except OSError as error:
        server.close()
        raise _explain(error, host, port) from None
    server.setblocking(False)
    return server


def _explain(error: OSError, host: str, port: int) -> Exception:
    if error.errno == errno.EADDRINUSE:
        owner = find_owner(port)
        who = f"process {owner[0]} ({owner[1]})" if owner else "another process"
        return PortInUseError(
            f"Port {port} is used by {who}.",
            hint=f"Use another one: --port {port + 1}.",
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"Port {port} is reserved for root.", hint="Use --port 30000.")
    return ConfigError(f"Cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}.")


def find_owner(port: int) -> tuple[int, str] | None:
    """Process id and command of whoever listens on `port`, as far as /proc shows it to us."""
    inodes = {f"socket:[{inode}]" for inode in _listening(port)}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        try:
            if os.readlink(descriptor) in inodes:
                process = descriptor.parent.parent
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").split()
                command = b" ".join(words).decode(errors="replace")
                return int(process.name), command[:80]
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else
    return None


def _listening(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found
