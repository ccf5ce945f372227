"""Several machines that run one model: which ranks each has, and where they meet."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from torch.distributed import Store

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Address:
    """Of machine 0, where the ranks of all machines find each other."""

    host: str
    port: int


@dataclass(frozen=True)
class Nodes:
    """`ranks` of them on each of `count` machines; this is number `own`."""

    count: int
    own: int
    ranks: int
    address: Address | None

    @classmethod
    def of(cls, options: EngineOptions) -> Nodes:
        count, own = options.nnodes, options.node_rank
        if count == 1 and own == 0:
            return cls(1, 0, options.num_gpus // options.dp_size, None)
        if own >= count:
            raise ConfigError(
                f"node_rank is {own} of {count} machines.",
                hint=f"Use 0 to {count - 1}, and --nnodes for how many there are.",
                param="node_rank",
            )
        if options.dp_size > 1:
            raise ConfigError(
                "Replicas do not go over several machines.",
                hint="Start one server per machine, or leave --dp-size out.",
                param="dp_size",
            )
        ranks, more = divmod(options.num_gpus, count)
        if more or not ranks:
            raise ConfigError(
                f"{options.num_gpus} ranks cannot be shared by {count} machines.",
                hint="--num-gpus counts the ranks of all machines, equally many on each.",
                param="num_gpus",
            )
        return cls(count, own, ranks, _address(options.dist_init_addr))


def _address(text: str | None) -> Address:
    host, _, port = (text or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"dist_init_addr is {text!r}." if text else "Several machines need --dist-init-addr.",
            hint="Use an address of machine 0 and a free port there, such as 10.0.0.1:29500.",
            param="dist_init_addr",
        )
    return Address(host, int(port))


def meeting_point(address: Address, *, first: bool, seconds: float) -> Store:
    """The store that the first rank keeps. It listens at this address and at no other one."""
    from torch.distributed import TCPStore

    wait = timedelta(seconds=seconds)
    if not first:
        return TCPStore(address.host, address.port, None, False, wait, wait_for_workers=False)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
    except OSError as error:
        listener.close()
        raise SetupError(
            f"{address.host}:{address.port} cannot be listened at: {error.strerror}.",
            hint="--dist-init-addr is an address of machine 0 with a port that is free there.",
            param="dist_init_addr",
        ) from None
    listener.listen(128)
    return TCPStore(
        address.host,
        address.port,
        None,
        True,
        wait,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def interface_to(address: Address) -> str:
    """The network interface of this machine by which the address is reached."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address.host, address.port))  # sends nothing
        except OSError as error:
            raise SetupError(
                f"There is no way to {address.host}: {error.strerror}.", param="dist_init_addr"
            ) from None
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("256s", name.encode()))
            try:
                fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request, True)
            except OSError:  # an interface without an address
                continue
            if request.tobytes()[20:24] == own:
                return name
    return "lo"  # every 127.x.x.x is loopback's, which names only one of them
