"""Jobs that share forward passes give what they give alone."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.engine import steps
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench


@pytest.fixture(scope="module", params=["tiny_wan_a", "tiny_wan_b"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    folder: Path = request.getfixturevalue(request.param)
    opened = open_pipeline(EngineOptions(model_path=str(folder)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


WISHES = {
    "short": {"prompt": "a red cube", "num_inference_steps": 3, "seed": 1},
    "long": {"prompt": "a dog on a hill", "num_inference_steps": 9, "seed": 2},
    "strong": {"prompt": "rain", "guidance_scale": 9.0, "seed": 3, "negative_prompt": "snow"},
    "pair": {"prompt": "two boats", "num_outputs": 2, "seed": 4},
}


def alone(pipeline: Pipeline, name: str) -> list[torch.Tensor]:
    bench = Bench(pipeline)
    bench.add(name, **WISHES[name])
    bench.run()
    return bench.latents[name]


def assert_same(mixed: list[torch.Tensor], single: list[torch.Tensor]) -> None:
    assert len(mixed) == len(single)
    for ours, theirs in zip(mixed, single, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("max_rows", [8, 2])
def test_mixed_jobs_equal_the_same_jobs_alone(pipeline: Pipeline, max_rows: int) -> None:
    bench = Bench(pipeline, max_rows)
    for name, wish in WISHES.items():
        bench.add(name, **wish)
    bench.run()
    assert not bench.errors and set(bench.outbox.outputs) == set(WISHES)
    for name in WISHES:
        assert_same(bench.latents[name], alone(pipeline, name))
    assert bench.count("denoise_forwards_total", rows=str(min(max_rows, 4))) >= 1


def test_a_job_joins_and_leaves_in_the_middle_of_another(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    long = bench.add("long", **WISHES["long"])
    while long.step < 4 or not long.encoded:
        bench.runner.step()
    bench.add("short", **WISHES["short"])
    bench.run()
    for name in ("long", "short"):
        assert_same(bench.latents[name], alone(pipeline, name))
    assert bench.count("denoise_forwards_total", rows="2") == 3
    assert bench.count("denoise_forwards_total", rows="1") == 6
    assert bench.count("denoise_joins_total", running="true") == 1
    assert bench.count("denoise_leaves_total", running="true") == 1


def test_different_shapes_take_turns(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    # By this thread's time: on a busy machine a unit takes long for no reason of its own.
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=time.thread_time))
    bench = Bench(pipeline)
    video = bench.add("video", num_frames=17, num_inference_steps=200)
    while not video.encoded or video.step < 2:
        bench.runner.step()
    image = bench.add("image", num_frames=1, num_inference_steps=4)
    while not image.encoded:
        bench.runner.step()
    at = video.step
    while image.step < 4:
        bench.runner.step()
    assert video.step - at <= 4 + 1, "each step of the image waits at most one of the video"
    bench.runner.drop("video")
    bench.run()
    assert set(bench.outbox.outputs) == {"image"}


def test_guided_and_unguided_jobs_do_not_share_but_both_finish(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    bench.add("guided", guidance_scale=5.0)
    bench.add("plain", guidance_scale=1.0)
    bench.run()
    assert bench.count("denoise_forwards_total", rows="1") == 12
    assert set(bench.outbox.outputs) == {"guided", "plain"}


def test_a_dropped_job_leaves_the_others_alone(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    bench.add("short", **WISHES["short"])
    gone = bench.add("long", **WISHES["long"])
    while gone.step < 2 or not gone.encoded:
        bench.runner.step()
        bench.look()
    bench.runner.drop("long")
    bench.run()
    assert set(bench.outbox.outputs) == {"short"} and bench.runner.running() == 0
    assert_same(bench.latents["short"], alone(pipeline, "short"))


def test_an_error_fails_the_group_and_nobody_else(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(pipeline)
    bench.add("bad", num_frames=9)
    bench.add("good", num_frames=5)
    forward = pipeline.velocity

    def fail_on_three_latent_frames(latents: torch.Tensor, *rest: object) -> torch.Tensor:
        if latents.shape[2] == 3:
            raise SglError("this shape fails")
        return forward(latents, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "velocity", fail_on_three_latent_frames)
    bench.run()
    assert set(bench.outbox.outputs) == {"good"} and set(bench.errors) == {"bad"}


def test_seeds_make_the_noise_whatever_else_is_in_the_batch(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    bench.add("three", num_outputs=3, seed=7, num_inference_steps=2)
    bench.add("single", seed=9, num_inference_steps=2)
    bench.run()
    first, _, third = bench.outbox.outputs["three"]
    single = bench.outbox.outputs["single"][0]
    assert (third.int() - single.int()).abs().max() <= 1, "output 2 of seed 7 is output 0 of seed 9"
    assert (first.int() - single.int()).abs().max() > 8


def test_progress_counts_every_step_and_names_the_phase(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    job = bench.add("job", num_inference_steps=4)
    bench.run()
    reports = bench.outbox.steps["job"]
    assert [step for phase, step, _ in reports if phase == "denoise"] == [1, 2, 3, 4]
    assert {phase for phase, _, _ in reports} == {"encode", "denoise", "decode"}
    assert set(job.seconds) == {"encode", "denoise", "decode"}
    assert dataclasses.asdict(job.params)["num_inference_steps"] == 4


def test_more_rows_than_a_batch_form_stable_batches(pipeline: Pipeline) -> None:
    collated = []
    collate = pipeline.collate
    bench = Bench(pipeline, max_rows=2)
    bench.pipeline.collate = lambda c: collated.append(len(c)) or collate(c)  # type: ignore[method-assign, func-returns-value]
    try:
        bench.add("three", num_outputs=3, num_inference_steps=6)
        bench.run()
    finally:
        del bench.pipeline.collate  # type: ignore[attr-defined]
    assert collated == [4, 2], "each batch is put together once: prompts and negatives"
    assert bench.count("denoise_forwards_total", rows="2") == 6
    assert bench.count("denoise_forwards_total", rows="1") == 6


def test_only_so_many_rows_of_a_shape_hold_their_prompts(pipeline: Pipeline) -> None:
    bench = Bench(pipeline, max_rows=2)
    for number in range(7):
        bench.add(f"job {number}", num_inference_steps=9)
    bench.add("other shape", num_frames=1, num_inference_steps=3)
    most, encoded = 0, []
    while bench.runner.step():
        jobs = bench.runner.jobs()
        encoded += [job.id for job in jobs if job.encoded and job.id not in encoded]
        most = max(most, sum(job.condition is not None for job in jobs if job.group[2] == 5))
    assert most == 2, "a full batch"
    assert encoded.index("other shape") <= 2, "another shape does not wait for this one"
    assert len(bench.outbox.outputs) == 8


def test_within_a_shape_nobody_overtakes(pipeline: Pipeline) -> None:
    bench = Bench(pipeline, max_rows=2)
    bench.add("first", num_outputs=2, num_inference_steps=4)
    bench.add("large", num_outputs=4, num_inference_steps=2)
    bench.add("small", num_outputs=1, num_inference_steps=2)
    encoded: list[str] = []
    while bench.runner.step():
        encoded += [j.id for j in bench.runner.jobs() if j.encoded and j.id not in encoded]
    assert encoded == ["first", "large", "small"]


def test_out_of_memory_in_a_batch_is_tried_again_in_smaller_ones(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    velocity = pipeline.velocity

    def room_for_two_rows(latents: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(latents) > 4:  # guided: two of each row
            raise torch.OutOfMemoryError("CUDA out of memory")
        return velocity(latents, *rest)  # type: ignore[arg-type]

    bench = Bench(pipeline)
    for name, wish in WISHES.items():
        bench.add(name, **wish)
    monkeypatch.setattr(pipeline, "velocity", room_for_two_rows)
    bench.run()
    monkeypatch.undo()
    assert not bench.errors
    for name in WISHES:
        assert_same(bench.latents[name], alone(pipeline, name))
    assert bench.count("denoise_forwards_total", rows="2") > 0
    assert bench.count("denoise_forwards_total", rows="3") == 0


def test_so_many_jobs_at_a_time_and_no_more(pipeline: Pipeline) -> None:
    bench = Bench(pipeline, jobs=1)
    jobs = [bench.add(f"job {number}", num_inference_steps=2) for number in range(3)]
    under_way = []
    while bench.runner.step():
        under_way.append(
            [job.id for job in jobs if job.encoded and job.id not in bench.outbox.outputs]
        )
    assert all(len(ids) <= 1 for ids in under_way)
    assert list(bench.outbox.outputs) == ["job 0", "job 1", "job 2"]


def test_guidance_begins_and_ends_where_it_is_asked_to(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = Bench(pipeline)
    job = by_hand.add("job", num_inference_steps=8)
    whole, without = job.params, dataclasses.replace(job.params, guidance_scale=1.0)
    more = True
    while more:
        job.params = whole if not job.encoded or 2 <= job.step < 6 else without
        more = by_hand.runner.step()
        by_hand.look()

    velocity, rows = pipeline.velocity, []

    def counted(latents: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(latents))
        return velocity(latents, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "velocity", counted)
    bench = Bench(pipeline)
    bench.add("job", num_inference_steps=8, guidance_start=0.25, guidance_stop=0.75)
    bench.run()
    assert torch.equal(bench.latents["job"][0], by_hand.latents["job"][0])
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1]
    rows.clear()
    together = Bench(pipeline)
    together.add("job", num_inference_steps=8, guidance_start=0.25, guidance_stop=0.75)
    together.add("always", num_inference_steps=8)
    together.run()
    assert_same(together.latents["job"], bench.latents["job"])
    assert rows.count(4) == 4, "steps with guidance share batches"
