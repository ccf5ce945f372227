"""A long forward pass looks up between its blocks, so its worker is not taken for hung."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine import pulse
from sgl_diffusion.engine.lineup import Batch, Decode, Encode
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench

PHASES = {Encode: "encode", Batch: "denoise", Decode: "decode"}


@pytest.fixture
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


def test_polls_come_in_every_phase_and_may_drop_the_job(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    bench = Bench(pipeline)
    phases = []

    def poll() -> None:
        phases.append(bench.outbox.steps["job"][-1][0])

    bench.outbox.on_poll = poll
    bench.add("job", num_inference_steps=2)
    bench.run()
    assert {"encode", "denoise", "decode"} <= set(phases)

    def drop() -> None:
        bench.runner.drop("second")

    bench.add("second", num_inference_steps=2)
    bench.outbox.on_poll = drop
    bench.run()
    assert set(bench.outbox.outputs) == {"job"} and not bench.errors


@pytest.mark.parametrize("phase", ["encode", "denoise", "decode"])
def test_a_unit_that_nobody_waits_for_ends_at_the_next_block(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    bench = Bench(pipeline)
    bench.add("job", num_inference_steps=2)
    polls: list[str] = []

    def drop() -> None:
        polls.append(phase)
        bench.runner.drop("job")

    while not polls:
        unit = bench.runner.choose()
        if phase == PHASES[type(unit)]:
            bench.outbox.on_poll = drop
        assert unit is not None
        bench.runner.run(unit)
    assert len(polls) == 1, "it was looked up once more"
    assert not bench.runner.step() and not bench.outbox.outputs and not bench.errors


def test_a_unit_that_somebody_waits_for_goes_on(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    bench = Bench(pipeline)
    bench.outbox.on_poll = lambda: bench.runner.drop("job") and None
    for name in ("job", "other"):
        bench.add(name, num_inference_steps=2)
    bench.run()
    assert set(bench.outbox.outputs) == {"other"} and not bench.errors


def test_polls_are_rare(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    polls: list[int] = []
    bench.outbox.on_poll = lambda: polls.append(1)
    bench.add("job", num_inference_steps=2)
    began = time.monotonic()
    bench.run()
    assert len(polls) <= (time.monotonic() - began) / pulse.EVERY_SECONDS + 1


def test_a_gpu_needs_no_pulse() -> None:
    module = torch.nn.Identity()
    pulse.keep_pulse([module], torch.device("cuda"), lambda: None)
    assert not module._forward_pre_hooks
