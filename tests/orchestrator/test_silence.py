"""When a stage that says nothing is taken for hung."""

from __future__ import annotations

import os
import time

import pytest

from sgl_diffusion.base.errors import WorkerLostError
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.limits import Limits
from sgl_diffusion.orchestrator.silence import Silence, processor_seconds
from tests.orchestrator.play import HASTY, play

LIMITS = Limits(silence=2.0, load_silence=5.0)
BURN = {"steps": 1, "burn": 2 * HASTY.silence}


def quiet_for(seconds: float, *, burn: float = 0.0) -> Silence:
    silence = Silence(LIMITS)
    silence.grows(0.0, os.getpid())
    until = time.process_time() + burn
    while time.process_time() < until:
        pass
    silence.grows(seconds, os.getpid())
    return silence


@pytest.mark.parametrize("on_cpu", [False, True])
def test_one_that_waits_is_hung(on_cpu: bool) -> None:
    pid = os.getpid()
    assert not quiet_for(1.9).too_long(pid, ready=True, on_cpu=on_cpu)
    assert quiet_for(4.9).too_long(pid, ready=True, on_cpu=on_cpu)
    assert not quiet_for(4.9).too_long(pid, ready=False, on_cpu=on_cpu)
    assert quiet_for(5.1).too_long(pid, ready=False, on_cpu=on_cpu)


def test_one_that_computes_on_a_cpu_is_not_and_not_for_ever() -> None:
    pid = os.getpid()
    assert not quiet_for(2.5, burn=0.5).too_long(pid, ready=True, on_cpu=True)
    assert quiet_for(2.5, burn=0.5).too_long(pid, ready=True, on_cpu=False)
    assert quiet_for(5.1, burn=0.7).too_long(pid, ready=True, on_cpu=True)


def test_a_word_begins_it_anew() -> None:
    silence = quiet_for(4.9)
    silence.heard()
    silence.grows(1.0, os.getpid())
    assert silence.seconds == 1.0 and not silence.too_long(None, ready=True, on_cpu=True)


def test_nobody_knows_what_another_system_computes() -> None:
    assert processor_seconds(None) is None
    assert processor_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.5)


def test_a_long_call_of_a_worker_on_a_cpu() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        await (await coordinator.submit(BURN)).result()
        assert coordinator.health().restarts == 0

    play(scenario, limits=HASTY, card={"device": "cpu"})


def test_a_long_call_of_a_worker_that_only_waits_for_its_device() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        with pytest.raises(WorkerLostError):
            await (await coordinator.submit(BURN)).result()

    play(scenario, limits=HASTY, card={"device": "cuda"})
