"""Partial pictures: which steps they show, and that they come closer to the final picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.previews import preview_steps
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench
from tests.engine.outbox import RecordingOutbox


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


def params(steps: int, count: int, strength: float | None = None) -> ResolvedParams:
    return ResolvedParams(
        prompt="a",
        negative_prompt="",
        width=16,
        height=16,
        num_frames=1,
        fps=1,
        num_inference_steps=steps,
        guidance_scale=1.0,
        flow_shift=None,
        max_sequence_length=1,
        seeds=(1,),
        partial_images=count,
        strength=strength,
    )


@pytest.mark.parametrize(
    ("steps", "count", "strength", "shown"),
    [
        (8, 0, None, []),
        (8, 1, None, [4]),
        (8, 3, None, [2, 4, 6]),
        (50, 2, None, [17, 33]),
        (4, 3, None, [1, 2, 3]),
        (2, 3, None, [1]),
        (1, 3, None, []),
        (8, 1, 0.5, [2]),
        (8, 3, 0.0, []),
    ],
)
def test_they_are_spread_evenly_and_never_the_last(
    steps: int, count: int, strength: float | None, shown: list[int]
) -> None:
    assert preview_steps(params(steps, count, strength)) == shown


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = float(np.square(one.astype(float) - other.astype(float)).mean())
    return 10 * np.log10(255**2 / max(error, 1e-9))


def shown_by(bench: Bench, job: str) -> list[tuple[int, int, np.ndarray]]:
    return [
        (meta["row"], meta["partial"], np.asarray(arrays[0])[0])
        for meta, arrays in bench.outbox.parts[job]
    ]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("steps", [8, 16])
def test_they_come_closer_to_the_final_picture(
    pipeline: Pipeline, steps: int, guidance: float
) -> None:
    bench = Bench(pipeline)
    wish = {"num_inference_steps": steps, "guidance_scale": guidance, "num_outputs": 2}
    bench.add("job", num_frames=1, partial_images=3, **wish)
    bench.add("other", num_frames=1, num_inference_steps=5)
    bench.run()
    assert "other" not in bench.outbox.parts
    finals = [np.asarray(clip)[0] for clip in bench.outbox.outputs["job"]]
    for row, final in enumerate(finals):
        mine = [(index, frame) for which, index, frame in shown_by(bench, "job") if which == row]
        assert [index for index, _ in mine] == [0, 1, 2]
        distances = [psnr(frame, final) for _, frame in mine]
        assert distances == sorted(distances) and distances[-1] > distances[0] + 1


def test_they_are_what_the_step_foresaw(pipeline: Pipeline) -> None:
    """The clean latents of the step itself, decoded: not the noisy ones."""
    bench = Bench(pipeline)
    job = bench.add("job", num_frames=1, num_inference_steps=4, partial_images=1)
    while job.step < 2:
        bench.runner.step()
    (row,) = job.rows
    assert row.state is not None
    foreseen = next(pipeline.decode(row.state.x0))
    noisy = next(pipeline.decode(row.state.x))
    bench.run()
    ((_, _, shown),) = shown_by(bench, "job")
    assert torch.equal(torch.from_numpy(shown.copy()), foreseen[0])
    assert not torch.equal(foreseen, noisy)


def test_of_a_clip_they_are_a_frame_from_its_middle(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    job = bench.add("job", num_frames=9, num_inference_steps=4, partial_images=1)
    while job.step < 2:
        bench.runner.step()
    state = job.rows[0].state
    assert state is not None and state.x0.shape[2] == 3
    foreseen = next(pipeline.decode(state.x0[:, :, 1:2]))
    bench.run()
    ((_, _, shown),) = shown_by(bench, "job")
    assert torch.equal(torch.from_numpy(shown.copy()), foreseen[0])
    assert bench.outbox.outputs["job"][0].shape[0] == 9


def test_only_steps_that_were_asked_for_are_decoded(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def decode(latents: torch.Tensor) -> object:
        decoded.append(latents)
        return original(latents)

    original = pipeline.decode
    monkeypatch.setattr(pipeline, "decode", decode)
    for count in (0, 2):
        decoded.clear()
        bench = Bench(pipeline)
        bench.add("job", num_frames=1, num_inference_steps=8, partial_images=count)
        bench.run()
        assert len(decoded) == count + 1


def test_they_change_nothing(pipeline: Pipeline) -> None:
    latents = []
    for count in (0, 3):
        bench = Bench(pipeline)
        bench.add("job", num_frames=1, partial_images=count)
        bench.run()
        latents.append(bench.latents["job"][0])
    assert torch.equal(*latents)


def test_a_card_without_previews_says_so(pipeline: Pipeline) -> None:
    from sgl_diffusion.base.errors import RequestError
    from sgl_diffusion.base.params import SamplingParams

    card = dataclasses.replace(pipeline.card, previews=False)
    with pytest.raises(RequestError) as caught:
        card.resolve(SamplingParams(prompt="a", partial_images=1), video=False)
    assert caught.value.code == "streaming_not_supported"


def test_the_recorder_notices_two_ends() -> None:
    outbox = RecordingOutbox()
    outbox.output("a", {}, [])
    with pytest.raises(AssertionError, match="ends once"):
        outbox.output("a", {}, [], final=False)
