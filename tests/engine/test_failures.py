"""What fails ends the job whose fault it was, and no other that shared its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import EngineError
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench, InLanes

# Seeds 1, 2 and 3; with one of them the bad job would be one of these.
GOOD = {"first": {"seed": 1}, "pair": {"seed": 2, "num_outputs": 2}}


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


def made(pipeline: Pipeline, more: dict[str, Any], **bounds: Any) -> Bench:
    """The good jobs, with others beside them."""
    bench = Bench(pipeline, **bounds)
    for name, wish in {**GOOD, **more}.items():
        bench.add(name, num_inference_steps=3, **wish)
    return bench


@pytest.fixture(scope="module")
def wanted(pipeline: Pipeline) -> dict[str, list[torch.Tensor]]:
    bench = made(pipeline, {})
    bench.run()
    return bench.latents


def assert_only_the_bad_failed(bench: Bench, wanted: dict[str, list[torch.Tensor]]) -> None:
    assert set(bench.errors) == {"bad"} and set(bench.outbox.outputs) == set(GOOD)
    assert bench.runner.running() == 0
    for name in GOOD:
        for want, found in zip(wanted[name], bench.latents[name], strict=True):
            assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def fails_after(pipeline: Pipeline, seen: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails if one of its rows is this one, as an adapter of one row could make it."""
    velocity = pipeline.velocity

    def fails(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        if any(torch.equal(row, seen) for row in latents):
            raise ValueError("this row fails")
        return velocity(latents, *rest)

    monkeypatch.setattr(pipeline, "velocity", fails)


@pytest.mark.parametrize("at", [0, 1])
def test_a_row_that_fails_does_not_end_the_others_of_its_step(
    at: int,
    pipeline: Pipeline,
    wanted: dict[str, list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = made(pipeline, {"bad": {"seed": 9, "num_outputs": 2}})
    bad = bench.runner.jobs()[-1]
    while not bad.encoded or bad.step < at:
        bench.runner.step()
    state = bad.rows[1].state
    assert state is not None
    fails_after(pipeline, state.x[0].clone(), monkeypatch)
    bench.run()
    assert_only_the_bad_failed(bench, wanted)
    assert isinstance(bench.errors["bad"], ValueError)
    together = bench.count("denoise_forwards_total", rows="5")
    assert together == at, "with the bad job until it fails"
    assert bench.count("denoise_forwards_total", rows="3") == 2 - at, "and without it afterwards"


def test_a_row_that_fails_in_a_lane_does_not_either(
    pipeline: Pipeline, wanted: dict[str, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shared(InLanes):
        """As lanes, but of all that can share a step."""

        def share(self, key: Any, waiting: Any, most: int, lanes: int = 1, company: int = 0) -> Any:
            return type(super().share(key, waiting, most))(
                min(sum(one.rows for one in waiting), most), lanes
            )

    bench = made(pipeline, {"bad": {"seed": 9}}, overlap=True, lanes=2)
    bench.runner.sizes.costs = Shared()
    while not all(job.encoded for job in bench.runner.jobs()):
        bench.runner.step()
        bench.look()
    bench.runner.settle()
    bench.look()
    state = bench.runner.jobs()[-1].rows[0].state
    assert state is not None
    fails_after(pipeline, state.x[0].clone(), monkeypatch)
    bench.run()
    assert_only_the_bad_failed(bench, wanted)
    assert bench.count("phase_units_total", phase="denoise", beside="true") > 0


def test_a_row_without_numbers_fails_alone_and_gives_no_picture(
    pipeline: Pipeline, wanted: dict[str, list[torch.Tensor]]
) -> None:
    bench = made(pipeline, {"bad": {"seed": 9}})
    bad = bench.runner.jobs()[-1]
    while not bad.encoded:
        bench.runner.step()
    state = bad.rows[0].state
    assert state is not None
    with torch.inference_mode():
        state.x[0, 0] = float("nan")
    bench.run()
    assert_only_the_bad_failed(bench, wanted)
    error = bench.errors["bad"]
    assert isinstance(error, EngineError) and error.code == "numbers_broken"
    assert bench.count("denoise_forwards_total", rows="4") == 3
