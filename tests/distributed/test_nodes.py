"""Which ranks a machine has, where machines meet, and which commands cannot work."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, SetupError
from sgl_diffusion.distributed.nodes import Address, Nodes, interface_to, meeting_point

ADDRESS = "127.0.0.1:29500"


def test_one_machine_has_all_ranks_of_a_replica() -> None:
    assert Nodes.of(EngineOptions(num_gpus=4, dp_size=2)) == Nodes(1, 0, 2, None)


def test_ranks_are_shared_by_machines() -> None:
    options = EngineOptions(num_gpus=4, nnodes=2, node_rank=1, dist_init_addr=ADDRESS)
    assert Nodes.of(options) == Nodes(2, 1, 2, Address("127.0.0.1", 29500))


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"node_rank": 2}, "node_rank"),
        ({"nnodes": 1, "node_rank": 1}, "node_rank"),
        ({"num_gpus": 3}, "num_gpus"),
        ({"num_gpus": 1}, "num_gpus"),
        ({"dp_size": 2}, "dp_size"),
        ({"dist_init_addr": None}, "dist_init_addr"),
        ({"dist_init_addr": "10.0.0.1"}, "dist_init_addr"),
        ({"dist_init_addr": ":29500"}, "dist_init_addr"),
        ({"dist_init_addr": "10.0.0.1:70000"}, "dist_init_addr"),
    ],
)
def test_what_cannot_work_is_refused(wrong: dict[str, Any], param: str) -> None:
    right = {"num_gpus": 4, "nnodes": 2, "dist_init_addr": ADDRESS}
    with pytest.raises(ConfigError) as caught:
        Nodes.of(EngineOptions(**{**right, **wrong}))
    assert caught.value.param == param and caught.value.hint


def test_the_meeting_point_listens_at_its_address_only() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    address = Address("127.0.0.2", port)
    first = meeting_point(address, first=True, seconds=60)
    other = meeting_point(address, first=False, seconds=60)
    first.set("a", "b")
    assert other.get("a") == b"b"
    listening = [
        fields[1]
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path(f"/proc/net/{table}").read_text().splitlines())
        if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0200007F:{port:04X}"]
    with pytest.raises(SetupError, match="cannot be listened at"):
        meeting_point(address, first=True, seconds=60)


def test_the_interface_of_loopback() -> None:
    assert interface_to(Address("127.0.0.1", 1)) == "lo"
    assert interface_to(Address("127.0.0.2", 1)) == "lo"
