"""Histograms: where a value falls, and what the coordinator counts in them."""

from __future__ import annotations

import math
import os
import signal

import pytest

from sgl_diffusion.base.errors import CancelledError, EngineError
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.histogram import BOUNDS, Histogram
from sgl_diffusion.orchestrator.job import Asked
from sgl_diffusion.server.metrics import render
from tests.exposition import Scrape, Series
from tests.orchestrator.play import children, play


def scrape(coordinator: Coordinator) -> Scrape:
    return Scrape(render(coordinator.metrics()).decode())


def only(histogram: Histogram) -> Series:
    ((series,),) = [each.values() for each in Scrape(text(histogram)).histograms.values()]
    return series


def text(histogram: Histogram) -> str:
    return render(histogram.metrics()).decode()


@pytest.mark.parametrize("index", range(len(BOUNDS)))
def test_a_bound_belongs_to_its_bucket(index: int) -> None:
    for value, first in ((BOUNDS[index], index), (math.nextafter(BOUNDS[index], 1e9), index + 1)):
        histogram = Histogram("queue_wait_seconds")
        histogram.add(value)
        counts = [count for _, count in only(histogram).buckets]
        assert counts == [float(place >= first) for place in range(len(BOUNDS) + 1)]


def test_buckets_hold_all_that_is_smaller() -> None:
    histogram = Histogram("request_seconds", "kind", "outcome")
    assert histogram.metrics() == []
    values = [0.0, 0.01, 0.02, 0.5, 3.0, 3.0, 100.0, 1e6]
    for value in values:
        histogram.add(value, "image", "completed")
    histogram.add(1.0, "video", "failed")
    read = Scrape(text(histogram))
    (images,) = read._of("sgld_request_seconds", {"kind": "image"})
    bounds = [bound for bound, _ in images.buckets]
    assert bounds == [*BOUNDS, math.inf]
    expected = [sum(value <= bound for value in values) for bound in bounds]
    assert [count for _, count in images.buckets] == expected
    assert images.sum == pytest.approx(sum(values)) and images.count == len(values)
    assert read.count("sgld_request_seconds", outcome="failed") == 1
    assert "# TYPE sgld_request_seconds histogram\n" in text(histogram)
    inf = 'sgld_request_seconds_bucket{kind="video",le="+Inf",outcome="failed"} 1.0\n'
    assert inf in text(histogram)


def test_what_ends_badly_has_waited_but_not_taken_its_time() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        whole = await coordinator.submit({"steps": 3, "parts": 2}, asked=Asked("image"))
        plain = await coordinator.submit({"steps": 3}, asked=Asked("image"))
        await whole.result()
        await plain.result()
        wrong = await coordinator.submit({"steps": 3, "at": 1, "wrong": True}, asked=Asked("edit"))
        with pytest.raises(EngineError):
            await wrong.result()
        endless = await coordinator.submit({"steps": 10**6, "sleep": 0.002}, asked=Asked("video"))
        async for event in endless.events():
            if event.kind == "progress":
                break
        endless.cancel()
        with pytest.raises(CancelledError):
            await endless.result()
        read = scrape(coordinator)
        counts = {
            name: [read.count(f"sgld_{name}", kind=kind) for kind in ("image", "edit", "video")]
            for name in ("queue_wait_seconds", "first_output_seconds", "job_seconds")
        }
        assert counts == {
            "queue_wait_seconds": [2, 1, 1],
            "first_output_seconds": [1, 0, 0],
            "job_seconds": [2, 0, 0],
        }
        times = [read.sum(f"sgld_{name}", kind="image") for name in counts]
        assert 0 < times[0] < times[2] and times[1] < times[2]

    play(scenario)


def test_the_wait_is_that_of_the_request() -> None:
    """It may have waited elsewhere before it became a job."""

    async def scenario(coordinator: Coordinator) -> None:
        earlier = Asked("video", Asked().since - 1000.0)
        await (await coordinator.submit({"steps": 2, "parts": 1}, asked=earlier)).result()
        read = scrape(coordinator)
        for name in ("queue_wait_seconds", "first_output_seconds", "job_seconds"):
            assert read.count(f"sgld_{name}") == 1 and read.sum(f"sgld_{name}") > 1000.0

    play(scenario)


def test_a_second_attempt_counts_no_second_time() -> None:
    async def scenario(coordinator: Coordinator) -> None:
        job = await coordinator.submit({"steps": 40, "sleep": 0.01, "parts": 2})
        killed = False
        async for event in job.events():
            if event.kind == "output" and not killed:
                (worker,) = children()
                os.kill(worker, signal.SIGKILL)
                killed = True
        assert killed and job.snapshot().attempt == 2
        await job.result()
        read = scrape(coordinator)
        for name in ("queue_wait_seconds", "first_output_seconds", "job_seconds"):
            assert read.count(f"sgld_{name}", kind="other") == 1, name

    play(scenario)
