"""Threads that go on at the same time share those of torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.threads import lane_threads, pool_of, step_lanes


@pytest.fixture(autouse=True)
def six_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_thread_of_a_pool_keeps_its_number(threads: int) -> None:
    together = threading.Barrier(2)

    def look() -> int:
        together.wait(60)
        torch.ones(4096).sum()  # whatever torch does when a thread works for the first time
        return torch.get_num_threads()

    with pool_of(2, threads, "test") as pool:
        assert torch.get_num_threads() == 6
        for _ in range(2):
            found = [pool.submit(look) for _ in range(2)]
            assert [future.result() for future in found] == [threads, threads]
        torch.set_num_threads(5)
        assert pool.submit(torch.get_num_threads).result() == threads


def lanes(device: str = "cpu", offload: tuple[str, ...] = (), **options: Any) -> int:
    parts = [SimpleNamespace(component=name) for name in offload]
    pipeline: Any = SimpleNamespace(
        device=torch.device(device), card=SimpleNamespace(offload=parts)
    )
    return step_lanes(EngineOptions(**options), cast("Pipeline", pipeline))


def test_there_are_as_many_lanes_as_threads_but_not_too_many() -> None:
    assert lanes() == 4 and lane_threads(4) == 1
    torch.set_num_threads(3)
    assert lanes() == 3 and lane_threads(3) == 1
    torch.set_num_threads(1)
    assert lanes() == 1
    torch.set_num_threads(16)
    assert lanes() == 4 and lane_threads(4) == 4


def test_one_lane_where_more_cannot_be() -> None:
    assert lanes("cuda") == 1
    assert lanes(offload=("transformer_2",)) == 1
    assert lanes(offload=("text_encoder", "vae")) == 4
    assert lanes(enable_torch_compile=True) == 1
    assert lanes(overlap=False) == 1
    assert lanes(max_running_jobs=1) == 1
    assert lanes(max_running_jobs=2) == 4
