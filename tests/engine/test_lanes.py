"""Steps of several batches at the same time: shown by who waits for whom, not by a clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.engine import pulse
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench, InLanes

PATIENCE = 60.0  # nothing waits so long unless it waits for ever
WISHES = {
    "short": {"prompt": "a red cube", "num_inference_steps": 3, "seed": 1},
    "long": {"prompt": "a dog on a hill", "num_inference_steps": 7, "seed": 2},
    "clip": {"prompt": "rain", "num_frames": 9, "seed": 3, "num_inference_steps": 3},
    "pair": {"prompt": "two boats", "num_outputs": 2, "seed": 4, "num_frames": 1},
    "seen": {"prompt": "sea", "num_frames": 1, "seed": 5, "partial_images": 2},
}


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def bench_of(pipeline: Pipeline, lanes: int = 2) -> Bench:
    bench = Bench(pipeline, overlap=True, lanes=lanes)
    bench.runner.sizes.costs = InLanes()
    return bench


class Watched:
    """Calls of `velocity`: in which thread, with how many of torch's, how many at a time. They
    go on when the gate is open, and the first ones in lanes when they have met."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._velocity = pipeline.velocity
        self._meet: threading.Barrier | None = None
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self.threads: list[tuple[str, int]] = []
        self.inside = self.most = 0

    def meet(self, together: int) -> None:
        self._meet = threading.Barrier(together, action=self._met)

    def _met(self) -> None:
        self._meet = None

    def __call__(self, *arguments: Any) -> torch.Tensor:
        with self._lock:
            self.threads.append((threading.current_thread().name, torch.get_num_threads()))
            self.inside += 1
            self.most = max(self.most, self.inside)
            meet = self._meet
        try:
            if meet is not None and threading.current_thread().name.startswith("sgld-denoise"):
                meet.wait(PATIENCE)
            assert self.gate.wait(PATIENCE)
            return self._velocity(*arguments)
        finally:
            with self._lock:
                self.inside -= 1


@pytest.fixture
def watched(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(pipeline)
    monkeypatch.setattr(pipeline, "velocity", watched)
    return watched


def until(bench: Bench, happened: Callable[[], bool]) -> None:
    while not happened():
        assert bench.runner.step() and not bench.errors


@pytest.mark.parametrize("frames", [5, 9])
def test_two_jobs_take_steps_at_the_same_time(
    pipeline: Pipeline, watched: Watched, frames: int
) -> None:
    """Of one size, and of two."""
    bench = bench_of(pipeline)
    watched.meet(2)
    bench.add("a", num_inference_steps=4, seed=1)
    bench.add("b", num_inference_steps=4, seed=2, num_frames=frames)
    bench.run()
    assert not bench.errors and set(bench.outbox.outputs) == {"a", "b"}
    assert watched.most == 2
    assert bench.count("phase_units_total", phase="denoise", beside="true") > 0
    in_lanes = {threads for name, threads in watched.threads if name.startswith("sgld-denoise")}
    assert in_lanes == {1}, "two lanes share two threads"
    assert torch.get_num_threads() == 2


def test_a_job_without_company_has_all_threads(pipeline: Pipeline, watched: Watched) -> None:
    bench = bench_of(pipeline)
    bench.add("only", num_inference_steps=3)
    bench.run()
    assert watched.threads == [(threading.current_thread().name, 2)] * 3
    assert bench.count("phase_units_total", phase="denoise", beside="true") == 0


def test_latents_are_those_of_one_thing_after_the_other(pipeline: Pipeline) -> None:
    made = {}
    for lanes in (1, 2):
        bench = bench_of(pipeline, lanes)
        for name, wish in WISHES.items():
            bench.add(name, **wish)
        bench.run()
        assert not bench.errors and set(bench.outbox.outputs) == set(WISHES)
        assert (bench.count("phase_units_total", phase="denoise", beside="true") > 0) == (lanes > 1)
        reports = [r for r in bench.outbox.steps["long"] if r[0] == "denoise"]
        assert [step for _, step, _ in reports] == list(range(1, 8)), "every step is told once"
        assert len(bench.outbox.parts["seen"]) == 2
        made[lanes] = bench.latents
    for name, single in made[1].items():
        for ours, theirs in zip(made[2][name], single, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_dropped_job_leaves_its_lane(
    pipeline: Pipeline, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    bench = bench_of(pipeline)
    watched.gate.clear()
    stays = bench.add("stays", num_inference_steps=4, seed=1)
    gone = bench.add("gone", num_inference_steps=4, seed=2)
    until(bench, lambda: stays.in_lane and gone.in_lane)
    bench.runner.drop("gone")
    watched.gate.set()
    bench.run()
    assert set(bench.outbox.outputs) == {"stays"} and not bench.errors
    assert bench.runner.running() == 0


def test_an_error_in_a_lane_fails_that_batch_only(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity = pipeline.velocity

    def fails_for_clips(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if latents.shape[2] > 1:
            raise SglError("this shape fails")
        return velocity(latents, *rest)

    monkeypatch.setattr(pipeline, "velocity", fails_for_clips)
    bench = bench_of(pipeline)
    bench.add("bad", num_frames=5)
    bench.add("good", num_frames=1)
    bench.run()
    assert set(bench.errors) == {"bad"} and set(bench.outbox.outputs) == {"good"}


def test_out_of_memory_ends_the_lanes_and_no_job(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity, failed = pipeline.velocity, []

    def full(*arguments: Any) -> torch.Tensor:
        if threading.current_thread().name.startswith("sgld-denoise") and not failed:
            failed.append(threading.current_thread().name)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return velocity(*arguments)

    monkeypatch.setattr(pipeline, "velocity", full)
    bench = bench_of(pipeline)
    for name in ("short", "long"):
        bench.add(name, **WISHES[name])
    bench.run()
    assert failed and not bench.errors and set(bench.outbox.outputs) == {"short", "long"}
    began = bench.count("phase_units_total", phase="denoise", beside="true")
    for name in ("c", "d"):
        bench.add(name, num_inference_steps=3)
    bench.run()
    assert bench.count("phase_units_total", phase="denoise", beside="true") == began
    assert not bench.errors and len(bench.outbox.outputs) == 4


def test_whoever_changes_weights_waits_for_the_steps(pipeline: Pipeline, watched: Watched) -> None:
    bench = bench_of(pipeline)
    watched.gate.clear()
    jobs = [bench.add(name, num_inference_steps=4) for name in "ab"]
    until(bench, lambda: all(job.in_lane for job in jobs))
    assert [job.step for job in jobs] == [0, 0]
    watched.gate.set()
    bench.runner.settle()
    assert [job.step for job in jobs] == [1, 1] and watched.inside == 0
    assert not any(job.in_lane for job in jobs)
    bench.run()
    assert set(bench.outbox.outputs) == {"a", "b"}


def test_steps_that_cannot_share_the_device_have_it_alone(
    pipeline: Pipeline, watched: Watched
) -> None:
    bench = bench_of(pipeline)
    for name in ("a", "b", "c"):
        bench.add(name, num_inference_steps=6, enable_teacache=name == "b")
    alone, main = [], threading.current_thread().name
    call = watched._velocity

    def looked(*arguments: Any) -> torch.Tensor:
        if threading.current_thread().name == main:
            alone.append(watched.inside)
        return call(*arguments)

    watched._velocity = looked
    bench.run()
    assert not bench.errors and len(bench.outbox.outputs) == 3
    assert len(alone) >= 6 and set(alone) == {1}
    assert bench.count("phase_units_total", phase="denoise", beside="true") > 0


def test_a_short_job_gets_a_lane_while_a_long_step_is_under_way(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its steps are made within one of the clip's."""
    velocity, over = pipeline.velocity, threading.Event()

    def held(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if latents.shape[2] == 5:
            assert over.wait(PATIENCE), "the short job waits for the end of the clip's step"
        return velocity(latents, *rest)

    monkeypatch.setattr(pipeline, "velocity", held)
    bench = bench_of(pipeline)
    clip = bench.add("clip", num_frames=17, num_inference_steps=3)
    bench.add("other", num_inference_steps=5)
    until(bench, lambda: clip.in_lane)
    bench.add("short", num_frames=1, num_inference_steps=3)
    until(bench, lambda: "short" in bench.outbox.outputs)
    assert clip.step == 0 and clip.in_lane
    over.set()
    bench.run()
    assert set(bench.outbox.outputs) == {"clip", "other", "short"} and not bench.errors
