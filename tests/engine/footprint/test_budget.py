"""What a loaded model leaves for jobs: told, kept to, and enough for one."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import msgspec
import pytest
import torch

from sgl_diffusion.base import memory
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import OutOfMemoryError, RequestError
from sgl_diffusion.base.footprint import Footprint
from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.engine.footprint import budget as module
from sgl_diffusion.engine.footprint.budget import Budget
from sgl_diffusion.engine.footprint.trials import measure
from sgl_diffusion.engine.footprint.usage import taken
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.outbox import RecordingOutbox

CPU = torch.device("cpu")
SMALL = SamplingParams(prompt="x", width=32, height=32, num_inference_steps=1)


@pytest.fixture(scope="module")
def wan(tiny_wan_a: Path) -> Pipeline:
    pipeline = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


@pytest.fixture(scope="module")
def counted(wan: Pipeline) -> Footprint:
    return measure(wan)


@pytest.fixture
def free(wan: Pipeline, counted: Footprint, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What was counted once serves all of these tests; nothing else is loaded meanwhile."""
    monkeypatch.setattr(module, "measure", lambda pipeline: counted)
    monkeypatch.setattr(module, "taken", lambda device: 0)
    return monkeypatch


def footprint(wan: Pipeline, notes: list[str], **options: str | int) -> Footprint | None:
    chosen = EngineOptions(**options)  # type: ignore[arg-type]
    return Budget(chosen, CPU).footprint(wan, notes.append)


def usual(wan: Pipeline, counted: Footprint, **more: int) -> float:
    params = wan.card.resolve(SamplingParams(prompt="a"), video=True)
    return dataclasses.replace(counted, **more).job_bytes(params)


def test_what_is_free_is_for_jobs(wan: Pipeline, free: pytest.MonkeyPatch) -> None:
    free.setattr(memory, "free_memory", lambda device: 20 * 10**9)
    found = footprint(wan, [])
    assert found is not None and found.room == 19 * 10**9 and found.tile_edge == 0
    # Replicas live side by side.
    found = footprint(wan, [], dp_size=2)
    assert found is not None and found.room == 19 * 10**9 // 2
    free.setattr(memory, "free_memory", lambda device: None)
    assert footprint(wan, []) is None


def test_a_budget_may_be_kept_with_tiles(
    wan: Pipeline, counted: Footprint, free: pytest.MonkeyPatch
) -> None:
    free.setattr(memory, "free_memory", lambda device: 10**12)
    notes: list[str] = []
    whole, tiled = usual(wan, counted), usual(wan, counted, tile_edge=256)
    assert tiled < whole
    found = footprint(wan, notes, memory_budget=str(int(whole) - 1))
    assert found is not None and found.tile_edge in (512, 256)
    assert "in tiles of" in notes[-1]
    found = footprint(wan, [], memory_budget=str(int(whole) + 1))
    assert found is not None and found.tile_edge == 0
    # Tiles change pixels: without a budget nobody asked for them.
    free.setattr(memory, "free_memory", lambda device: int(whole))
    found = footprint(wan, [])
    assert found is not None and found.tile_edge == 0


def test_no_room_for_the_usual_is_told_and_none_for_anything_ends_the_start(
    wan: Pipeline,
    counted: Footprint,
    free: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    free.setattr(memory, "free_memory", lambda device: 10**12)
    with caplog.at_level(logging.WARNING):
        assert footprint(wan, [], memory_budget="60m")
    assert "requests that name no size will be refused" in caplog.text
    with pytest.raises(OutOfMemoryError, match="smallest picture takes 0.0"):
        footprint(wan, [], memory_budget="1m")


def test_what_cannot_be_counted_is_served_unchecked(
    wan: Pipeline, free: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(pipeline: Pipeline) -> Footprint:
        raise RuntimeError("no rule for this op")

    free.setattr(module, "measure", broken)
    assert footprint(wan, []) is None
    assert "no request will be refused" in caplog.text


def test_a_worker_refuses_what_does_not_fit_and_tells_what_jobs_took(wan: Pipeline) -> None:
    outbox = RecordingOutbox()
    worker = DiffusionWorker(lambda note: wan, EngineOptions(), outbox)
    card = msgspec.convert(worker.load(), ModelCard)
    assert card.footprint is not None and card.footprint.room > 10**8
    params = wan.card.resolve(SMALL, video=False)
    worker.submit("a", {"params": dataclasses.asdict(params)})
    # As a server with more memory took it in.
    huge = dataclasses.replace(params, width=2**20, height=2**20)
    worker.submit("b", {"params": dataclasses.asdict(huge)})
    while worker.step():
        pass
    assert 10**8 < outbox.meta["a"]["peak_memory"] <= 2 * taken(CPU)
    assert outbox.errors["b"].code == "request_too_large"
    with pytest.raises(RequestError, match="beside the model"):
        tight = dataclasses.replace(card.footprint, room=10**6)
        dataclasses.replace(card, footprint=tight).resolve(SMALL, video=False)
    values = {metric.name: metric.value for metric in worker.metrics()}
    assert values["memory_room_bytes"] == card.footprint.room
    assert values["memory_taken_bytes"] > 10**8 and values["memory_model_bytes"] > 10**8
