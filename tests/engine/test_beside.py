"""Encoding and decoding go on while steps are made: shown by who waits for whom, not by a clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import SglError
from sgl_diffusion.engine import steps
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench

PATIENCE = 60.0  # nothing waits so long unless it waits for ever


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


def under_way(pipeline: Pipeline) -> Bench:
    """A long job in the middle of its steps, with overlap."""
    bench = Bench(pipeline, overlap=True)
    job = bench.add("long", num_inference_steps=40, seed=1)
    while job.step < 2:
        bench.runner.step()
    return bench


def encoded(bench: Bench, job: Job) -> Job:
    """It joins the long job, which makes one step only while the prompts are encoded: if the lane
    took longer than all of its steps, nothing would be left to go on beside."""
    while not job.encoded:
        assert bench.runner.step()
        bench.runner.settle()
    return job


def until_steps(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, name: str, steps: int) -> Any:
    """From now on a call of `name` goes on only when so many more steps have begun; the threads
    that called it are noted."""
    call, velocity = getattr(pipeline, name), pipeline.velocity
    enough, begun, threads = threading.Event(), [], []

    def held(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        assert enough.wait(PATIENCE), f"no step is made while {name} runs"
        return call(*arguments)

    def counted(*arguments: Any) -> torch.Tensor:
        begun.append(threading.current_thread().name)
        if len(begun) == steps:
            enough.set()
        return velocity(*arguments)

    monkeypatch.setattr(pipeline, name, held)
    monkeypatch.setattr(pipeline, "velocity", counted)
    return threads


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_steps_go_on_meanwhile(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench = under_way(pipeline)
    short = bench.add("short", num_inference_steps=2, seed=2)
    if name == "decode":
        encoded(bench, short)
    threads = until_steps(monkeypatch, pipeline, name, 3)
    while "short" not in bench.outbox.outputs:
        assert bench.runner.step() and not bench.errors
    assert threads[0].startswith(f"sgld-{name}")
    assert bench.count("phase_units_total", phase=name, beside="true") > 0
    bench.run()
    assert set(bench.outbox.outputs) == {"long", "short"}


def test_encoding_decoding_and_steps_all_at_once(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode of the first job waits for the encode of the third, which waits for steps of the
    second."""
    bench = under_way(pipeline)
    encode, decode, velocity = pipeline.encode, pipeline.decode, pipeline.velocity
    decoding, encoding, stepping = (threading.Event() for _ in range(3))

    def held_encode(prompt: str, *rest: Any) -> Any:
        if prompt == "third":
            encoding.set()
            assert decoding.wait(PATIENCE) and stepping.wait(PATIENCE)
        return encode(prompt, *rest)

    def held_decode(latents: torch.Tensor) -> Iterator[torch.Tensor]:
        decoding.set()
        assert encoding.wait(PATIENCE) and stepping.wait(PATIENCE)
        return decode(latents)

    def counted(*arguments: Any) -> torch.Tensor:
        if encoding.is_set() and decoding.is_set():
            stepping.set()
        return velocity(*arguments)

    first = encoded(bench, bench.add("first", num_inference_steps=1, seed=2))
    while first.to_denoise:
        bench.runner.step()
    monkeypatch.setattr(pipeline, "encode", held_encode)
    monkeypatch.setattr(pipeline, "decode", held_decode)
    monkeypatch.setattr(pipeline, "velocity", counted)
    bench.runner.trace.start()
    bench.add("third", prompt="third", num_inference_steps=1, seed=3)
    bench.run()
    assert not bench.errors and stepping.is_set()
    assert set(bench.outbox.outputs) == {"long", "first", "third"}
    spans = [event for event in bench.runner.trace.stop()["traceEvents"] if event["ph"] == "X"]
    encode, decode = (
        next(span for span in spans if span["name"] == name and span["args"]["job"] == job)
        for name, job in (("encode", "third"), ("decode", "first"))
    )
    steps = [span for span in spans if span["name"] == "denoise"]
    beside = [step for step in steps if _meet(step, encode) and _meet(step, decode)]
    assert _meet(encode, decode) and any(step["args"]["jobs"] == ["long"] for step in beside)
    assert len({span["tid"] for span in (encode, decode, beside[0])}) == 3


def _meet(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether there is a moment that is in both spans."""
    return max(one["ts"], other["ts"]) < min(one["ts"] + one["dur"], other["ts"] + other["dur"])


def test_pictures_are_the_same_with_and_without(pipeline: Pipeline) -> None:
    made = []
    for overlap in (False, True):
        bench = Bench(pipeline, overlap=overlap)
        for number in range(4):
            frames = 5 if number % 2 else 1
            bench.add(f"job {number}", seed=number, num_frames=frames, prompt=f"prompt {number}")
        bench.run()
        assert not bench.errors
        made.append(bench.outbox.outputs)
    for name, clips in made[0].items():
        for ours, theirs in zip(made[1][name], clips, strict=True):
            assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_an_error_beside_the_steps_fails_that_job_only(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    bench = under_way(pipeline)
    bench.add("bad", num_inference_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, name, fail)
        while "bad" not in bench.errors:
            assert bench.runner.step()
    bench.run()
    assert set(bench.errors) == {"bad"} and set(bench.outbox.outputs) == {"long"}


def fail(*_: object) -> None:
    raise SglError("this part fails")


def test_a_job_that_is_dropped_meanwhile_leaves_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = under_way(pipeline)
    threads = until_steps(monkeypatch, pipeline, "encode", 2)
    gone = bench.add("gone", num_inference_steps=1)
    while gone.away != "encode":
        bench.runner.step()
    bench.runner.drop("gone")
    bench.run()
    bench.runner.settle()
    assert threads and not gone.encoded
    assert set(bench.outbox.outputs) == {"long"} and not bench.errors


def test_whoever_changes_weights_waits_for_the_lanes(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = under_way(pipeline)
    encode, release, done = pipeline.encode, threading.Event(), []

    def held(*arguments: Any) -> Any:
        assert release.wait(PATIENCE)
        try:
            return encode(*arguments)
        finally:
            done.append(threading.current_thread().name)

    monkeypatch.setattr(pipeline, "encode", held)
    gone = bench.add("gone", num_inference_steps=1)
    while gone.away != "encode":
        bench.runner.step()
    bench.runner.drop("gone")
    assert not done
    release.set()
    bench.runner.settle()
    assert len(done) == 2, "the prompt and the negative one"


def test_what_has_no_room_beside_the_steps_is_done_between_them(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = under_way(pipeline)
    began = bench.count("phase_units_total", beside="true")
    monkeypatch.setattr(bench.runner.sizes.room, "lane", lambda jobs, job: False)
    long = bench.runner.job("long")
    bench.add("short", num_inference_steps=2, seed=2)
    while "short" not in bench.outbox.outputs:
        assert bench.runner.step()
    assert long is not None and long.step < 10
    bench.run()
    assert bench.count("phase_units_total", beside="true") == began
    assert set(bench.outbox.outputs) == {"long", "short"} and not bench.errors


@pytest.mark.parametrize("overlap", [False, True])
def test_a_short_job_of_another_size_waits_for_no_second_step_of_a_long_one(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """By a clock that only steps move: a hundred times as far for a clip as for a picture."""
    seconds, clips, velocity = 0.0, 0, pipeline.velocity

    def timed(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal seconds, clips
        clip = latents.shape[2] > 1
        clips += clip
        seconds += 10.0 if clip else 0.1
        return velocity(latents, *rest)

    bench = Bench(pipeline, overlap=overlap)
    monkeypatch.setattr(pipeline, "velocity", timed)
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: seconds))
    long = bench.add("long", num_inference_steps=30)
    while long.step < 3:
        bench.runner.step()
    before = clips
    bench.add("short", num_inference_steps=20, num_frames=1)
    while "short" not in bench.outbox.outputs:
        bench.runner.step()
    assert clips == before
    bench.run()
    assert not bench.errors and set(bench.outbox.outputs) == {"long", "short"}


def test_a_whole_clip_is_decoded_within_one_step(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = under_way(pipeline)
    decode, velocity, decoded, held = pipeline.decode, pipeline.velocity, threading.Event(), []

    def told(latents: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from decode(latents)
        decoded.set()

    def one_step(*arguments: Any) -> torch.Tensor:
        if bench.runner.job("short").away == "decode" and not held:
            held.append(decoded.wait(PATIENCE))
        return velocity(*arguments)

    encoded(bench, bench.add("short", num_inference_steps=1, num_outputs=2))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode", told)
        patch.setattr(pipeline, "velocity", one_step)
        while not held:
            assert bench.runner.step()
    assert held == [True]
    bench.run()
    assert [len(clip) for clip in bench.outbox.outputs["short"]] == [5, 5]


def test_nobody_waits_for_the_rest_of_a_decode(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is dropped leaves its lane with the chunk that is under way."""
    bench = under_way(pipeline)
    decode, entered, release, chunks = pipeline.decode, threading.Event(), threading.Event(), []

    def held(latents: torch.Tensor) -> Iterator[torch.Tensor]:
        entered.set()
        assert release.wait(PATIENCE)
        for frames in decode(latents):
            chunks.append(frames)
            yield frames

    monkeypatch.setattr(pipeline, "decode", held)
    encoded(bench, bench.add("gone", num_inference_steps=1))
    while not entered.is_set():
        assert bench.runner.step()
    bench.runner.drop("gone")
    release.set()
    bench.runner.settle()
    assert len(chunks) == 1
    monkeypatch.undo()
    bench.run()
    assert set(bench.outbox.outputs) == {"long"} and not bench.errors


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_only_one_thread_at_a_time_encodes_or_decodes(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A VAE or a tokenizer may remember things between two calls."""
    call, threads, inside = getattr(pipeline, name), set(), threading.Lock()

    def alone(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        assert inside.acquire(blocking=False), f"two threads {name} at the same time"
        try:
            result = call(*arguments)
            return iter(list(result)) if name == "decode" else result
        finally:
            inside.release()

    monkeypatch.setattr(pipeline, name, alone)
    bench = Bench(pipeline, overlap=True)
    for number in range(24):
        frames, steps = (5, 1, 9)[number % 3], number % 4 + 1
        bench.add(f"job {number}", num_frames=frames, num_inference_steps=steps, seed=number)
    bench.run()
    assert not bench.errors and len(bench.outbox.outputs) == 24
    assert len(threads) == 2, "some in the lane, some where the steps are"


@pytest.mark.parametrize("name", ["encode", "decode", "velocity"])
def test_out_of_memory_ends_the_overlap_and_no_job(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever fails while two things are done at a time is done again alone."""
    bench = under_way(pipeline)
    call, encode, failed = getattr(pipeline, name), pipeline.encode, []
    away, over = threading.Event(), threading.Event()

    def full(*arguments: Any) -> Any:
        here = not threading.current_thread().name.startswith("sgld-")
        if here == (name == "velocity") and (not here or away.is_set()) and not failed:
            failed.append(name)
            over.set()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(*arguments)

    def until_over(*arguments: Any) -> Any:
        away.set()
        assert over.wait(PATIENCE)
        return encode(*arguments)

    short = bench.add("short", num_inference_steps=2, seed=2)
    if name == "decode":
        encoded(bench, short)
    monkeypatch.setattr(pipeline, name, full)
    if name == "velocity":
        monkeypatch.setattr(pipeline, "encode", until_over)
    bench.run()
    assert failed and not bench.errors
    monkeypatch.undo()
    calm = Bench(pipeline)
    calm.add("short", num_inference_steps=2, seed=2)
    calm.run()
    ours, theirs = bench.outbox.outputs["short"][0], calm.outbox.outputs["short"][0]
    assert (ours.int() - theirs.int()).abs().max() <= 1
    began = bench.count("phase_units_total", beside="true")
    bench.add("later", num_inference_steps=2, seed=2)
    bench.add("latest", num_inference_steps=3, seed=2)
    bench.run()
    assert bench.count("phase_units_total", beside="true") == began
