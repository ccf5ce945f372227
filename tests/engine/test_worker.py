"""The worker: messages in, frames or errors a user may read out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, EngineError, OutOfMemoryError, RequestError
from sgl_diffusion.base.params import ModelCard, SamplingParams
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.ops import dispatch
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.outbox import RecordingOutbox


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


@pytest.fixture
def outbox() -> RecordingOutbox:
    return RecordingOutbox()


@pytest.fixture
def worker(pipeline: Pipeline, outbox: RecordingOutbox) -> DiffusionWorker:
    made = DiffusionWorker(lambda note: pipeline, EngineOptions(), outbox)
    assert made.load()["family"] == "wan"
    return made


def payload(card: ModelCard, **more: object) -> dict[str, object]:
    small = {"prompt": "x", "width": 32, "height": 32, "num_inference_steps": 2}
    wish = SamplingParams(**{**small, **more})  # type: ignore[arg-type]
    return {"params": dataclasses.asdict(card.resolve(wish, video=True))}


def finish(worker: DiffusionWorker) -> None:
    while worker.step():
        pass


def test_a_worker_that_planned_for_a_budget_takes_jobs(
    tiny_wan_a: Path, outbox: RecordingOutbox
) -> None:
    options = EngineOptions(model_path=str(tiny_wan_a), memory_budget="20g")
    worker = DiffusionWorker(lambda note: open_pipeline(options, note), options, outbox)
    card = worker.load()
    assert card["footprint"]["room"] > 0
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    worker.submit("a", payload(opened.card, num_frames=1))
    finish(worker)
    assert len(outbox.outputs["a"]) == 1


def test_one_clip_per_seed_with_its_times(
    worker: DiffusionWorker, outbox: RecordingOutbox, pipeline: Pipeline
) -> None:
    worker.submit("a", payload(pipeline.card, num_outputs=2, num_frames=5))
    assert worker.running() == 1
    finish(worker)
    clips = outbox.outputs["a"]
    assert [tuple(clip.shape) for clip in clips] == [(5, 32, 32, 3)] * 2
    assert {clip.dtype for clip in clips} == {torch.uint8}
    assert set(outbox.meta["a"]["seconds"]) == {"encode", "denoise", "decode"}
    assert worker.running() == 0
    names = {metric.name for metric in worker.metrics()}
    assert {"op_calls_total", "denoise_forwards_total", "phase_seconds_total"} <= names
    assert ("vram_peak_bytes" in names) == torch.cuda.is_initialized()


def test_the_time_of_steps_by_size(worker: DiffusionWorker, pipeline: Pipeline) -> None:
    worker.submit("a", payload(pipeline.card, num_frames=5))
    worker.submit("b", payload(pipeline.card, width=48, num_frames=1, num_inference_steps=3))
    finish(worker)
    counts, sums = (
        {m.labels["size"]: m.value for m in worker.metrics() if m.name == f"step_seconds_{part}"}
        for part in ("count", "sum")
    )
    assert counts == {"32x32x5": 2, "48x32": 3}
    assert all(0 < seconds < 60 for seconds in sums.values())
    (model,) = {m.labels["model"] for m in worker.metrics() if m.name == "step_seconds_sum"}
    assert model == pipeline.card.name


def test_pictures_of_three_sizes_share_a_step(outbox: RecordingOutbox, pipeline: Pipeline) -> None:
    """What three sizes cost together is not known yet, so it is tried."""
    worker = DiffusionWorker(lambda note: pipeline, EngineOptions(overlap=False), outbox)
    worker.load()
    for width in (32, 48, 64):
        worker.submit(str(width), payload(pipeline.card, width=width, num_frames=1))
    finish(worker)
    assert {clip.shape[2] for (clip,) in outbox.outputs.values()} == {32, 48, 64}
    packed = [m.labels for m in worker.metrics() if m.name == "packed_forwards_total"]
    assert {"sizes": "3"} in packed


def test_parameters_of_another_version_fail_that_job(
    worker: DiffusionWorker, outbox: RecordingOutbox
) -> None:
    worker.submit("a", {"params": {"prompt": 1}})
    worker.submit("b", {})
    assert all(isinstance(outbox.errors[name], RequestError) for name in "ab")
    assert worker.running() == 0


@pytest.fixture
def breaks(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def set_error(error: Exception) -> None:
        def raising(*_: object) -> torch.Tensor:
            raise error

        monkeypatch.setattr(pipeline, "velocity", raising)

    yield set_error


def _no_memory_on_the_cpu() -> RuntimeError:
    """What torch itself says."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory secret"), OutOfMemoryError, "at step 0 of 2"),
        (MemoryError(), OutOfMemoryError, "32x32"),
        (_no_memory_on_the_cpu(), OutOfMemoryError, "at step 0 of 2"),
        (ValueError("secret path /home/x"), EngineError, "internal error (ValueError)"),
        (RequestError("too big"), RequestError, "too big"),
    ],
)
def test_errors_are_explained_without_foreign_text(
    worker: DiffusionWorker,
    outbox: RecordingOutbox,
    pipeline: Pipeline,
    breaks: object,
    error: Exception,
    kind: type[Exception],
    text: str,
) -> None:
    worker.submit("a", payload(pipeline.card))
    breaks(error)  # type: ignore[operator]
    finish(worker)
    told = outbox.errors["a"]
    assert type(told) is kind and text in str(told) and "secret" not in str(told)
    assert worker.running() == 0, "the worker goes on without the job"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("secret"), _no_memory_on_the_cpu()])
def test_a_model_that_does_not_fit_says_so(outbox: RecordingOutbox, error: Exception) -> None:
    def open_pipeline(note: object) -> Pipeline:
        raise error

    with pytest.raises(OutOfMemoryError, match="The model does not fit"):
        DiffusionWorker(open_pipeline, EngineOptions(), outbox).load()


def test_a_wrong_name_of_an_op_ends_the_load(
    pipeline: Pipeline, outbox: RecordingOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLD_OPS", "norm_modulate=tritn")
    monkeypatch.setattr(dispatch, "_named", None)  # what a fresh process knows
    with pytest.raises(ConfigError, match="no implementation 'tritn'"):
        DiffusionWorker(lambda note: pipeline, EngineOptions(), outbox).load()


def test_an_unknown_control_action_is_refused(worker: DiffusionWorker) -> None:
    with pytest.raises(RequestError, match="no control action"):
        worker.control("dance", {})


def test_what_cannot_run_ends_the_load(
    outbox: RecordingOutbox, pipeline: Pipeline, breaks: object
) -> None:
    breaks(torch.OutOfMemoryError("CUDA out of memory"))  # type: ignore[operator]
    worker = DiffusionWorker(lambda note: pipeline, EngineOptions(), outbox)
    with pytest.raises(OutOfMemoryError, match="16x16"):
        worker.load()
    assert not outbox.errors, "no client hears of the warm-up"


def test_the_warm_up_leaves_no_trace(worker: DiffusionWorker, outbox: RecordingOutbox) -> None:
    assert worker.running() == 0 and not outbox.outputs
    assert not any(metric.name.startswith("denoise") for metric in worker.metrics())
