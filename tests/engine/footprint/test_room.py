"""Jobs begin, batches grow and lanes are used only as far as the memory goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.footprint import Footprint
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.engine.costs import Waiting
from sgl_diffusion.engine.denoise import shape_key
from sgl_diffusion.engine.footprint.room import Room
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench, InLanes

# Plain numbers: what a job keeps, a step and a chunk are of one order.
FOOTPRINT = Footprint(
    room=0,
    text=1e6,
    condition=0.0,
    shown=None,
    shown_kept=None,
    shown_step=0.0,
    step_row=0.0,
    step_cell=100.0,
    still_pixel=10.0,
    clip_pixel=10.0,
    clip_kept_pixel=5.0,
    row_cell=1000.0,
    cell_pixels=64.0,
    frames_per_cell=4,
)
WISH = SamplingParams(
    prompt="a", width=256, height=256, num_frames=1, num_inference_steps=4, guidance_scale=1.0
)


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


def waiting(pipeline: Pipeline, count: int) -> list[Job]:
    params = pipeline.card.resolve(WISH, video=False)
    return [Job(str(number), params) for number in range(count)]


def room_of(size: float) -> Room:
    room = Room()
    room.footprint = dataclasses.replace(FOOTPRINT, room=int(size))
    return room


def test_without_a_footprint_everything_fits(pipeline: Pipeline) -> None:
    jobs = waiting(pipeline, 3)
    assert Room().fitting(jobs) == jobs
    assert Room().lane(jobs, jobs[0])


def test_jobs_wait_in_order_until_there_is_room(pipeline: Pipeline) -> None:
    jobs = waiting(pipeline, 4)
    kept, unit = FOOTPRINT.kept(jobs[0].params), FOOTPRINT.text
    assert unit == max(
        FOOTPRINT.text,
        FOOTPRINT.step_bytes(jobs[0].params),
        FOOTPRINT.decode_bytes(jobs[0].params) + FOOTPRINT.frames(jobs[0].params),
    )
    assert room_of(2 * kept + unit).fitting(jobs) == jobs[:2]
    # Alone every job may run that was taken in.
    assert room_of(1).fitting(jobs) == jobs[:1]
    # One that was begun stays, whoever comes before it by now; nobody else begins.
    jobs[2].away = "encode"
    room = room_of(1.5 * kept + 2 * unit)
    assert room.fitting(jobs) == [jobs[2]]


def test_a_lane_needs_room_beside_a_step(pipeline: Pipeline) -> None:
    (new,) = waiting(pipeline, 1)
    bench = Bench(pipeline)
    steps = bench.add("a", **dataclasses.asdict(WISH))
    while not steps.encoded:
        bench.runner.step()
    step, kept = FOOTPRINT.step_bytes(steps.params), FOOTPRINT.kept(steps.params)
    need = kept + step + kept + FOOTPRINT.text
    assert room_of(need + 1).lane([steps, new], new)
    assert not room_of(need - 1).lane([steps, new], new)


def test_steps_in_lanes_take_room_from_others(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    jobs = [bench.add(name, **dataclasses.asdict(WISH)) for name in "ab"]
    while not all(job.encoded for job in jobs):
        bench.runner.step()
    key = shape_key(pipeline, jobs[0].rows[0])
    kept, step = FOOTPRINT.kept(jobs[0].params), FOOTPRINT.step_bytes(jobs[0].params)
    wait = [Waiting(jobs[1].params, 1)]
    jobs[0].in_lane = True
    assert room_of(2 * kept + 2 * step + 9).rows(jobs, key, wait, 8) == 1
    tight = room_of(2 * kept + 1.9 * step)
    assert tight.rows(jobs, key, wait, 8) == 0
    assert tight.rows(jobs, key, wait, 8, beside=False) == 1


@pytest.mark.parametrize(("steps", "together"), [(1.9, 1), (9.0, 2)])
def test_without_room_no_two_steps_are_made_at_the_same_time(
    pipeline: Pipeline, steps: float, together: int
) -> None:
    bench = Bench(pipeline, overlap=True, lanes=2)
    bench.runner.sizes.costs = InLanes()
    jobs = [bench.add(name, **dataclasses.asdict(WISH)) for name in "ab"]
    large = dataclasses.replace(FOOTPRINT, step_cell=1e4)  # of all units the largest
    kept, step = large.kept(jobs[0].params), large.step_bytes(jobs[0].params)
    room = int(2 * kept + steps * step)
    bench.runner.sizes.room.footprint = dataclasses.replace(large, room=room)
    most = 0
    while bench.runner.step():
        most = max(most, sum(job.in_lane for job in jobs))
    assert most == together
    assert set(bench.outbox.outputs) == {"a", "b"} and not bench.errors


def test_batches_are_as_large_as_the_memory_allows(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    jobs = [bench.add(name, **dataclasses.asdict(WISH)) for name in "abcd"]
    kept, step = FOOTPRINT.kept(jobs[0].params), FOOTPRINT.step_bytes(jobs[0].params)
    bench.runner.sizes.room.footprint = dataclasses.replace(
        FOOTPRINT, room=int(4 * kept + 2.5 * step), text=2.5 * step, still_pixel=0.0
    )
    bench.run()
    assert len(bench.outbox.outputs) == 4 and not bench.errors
    assert bench.count("denoise_forwards_total", rows="2") > 0
    assert all(bench.count("denoise_forwards_total", rows=str(rows)) == 0 for rows in (3, 4))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_job_begins_when_another_has_given_its_memory_back(
    pipeline: Pipeline, overlap: bool
) -> None:
    bench = Bench(pipeline, overlap=overlap)
    first, second = (bench.add(name, **dataclasses.asdict(WISH)) for name in "ab")
    bench.runner.sizes.room.footprint = dataclasses.replace(
        FOOTPRINT, room=int(FOOTPRINT.job_bytes(first.params)) + 1
    )
    while "a" not in bench.outbox.outputs:
        assert bench.runner.step()
        assert not second.begun or "a" in bench.outbox.outputs
    bench.run()
    assert set(bench.outbox.outputs) == {"a", "b"} and not bench.errors


def test_what_was_begun_always_ends(pipeline: Pipeline) -> None:
    """With no room at all jobs go through one by one."""
    bench = Bench(pipeline, overlap=True)
    wish: dict[str, Any] = dataclasses.asdict(WISH)
    for name, outputs in (("a", 1), ("b", 3), ("c", 1)):
        bench.add(name, **{**wish, "num_outputs": outputs})
    bench.runner.sizes.room.footprint = dataclasses.replace(FOOTPRINT, room=1)
    bench.run()
    assert set(bench.outbox.outputs) == {"a", "b", "c"} and not bench.errors
    assert bench.count("denoise_forwards_total", rows="2") == 0
    assert len(bench.outbox.outputs["b"]) == 3
