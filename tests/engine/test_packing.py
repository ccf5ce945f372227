"""Pictures of different sizes share denoise steps, and come out as they do alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.costs import Costs, Waiting
from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.footprint.room import Room
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench
from tests.engine.footprint.test_room import FOOTPRINT
from tests.engine.test_costs import PARAMS

SIZES = {"square": (64, 64), "wide": (96, 32), "tall": (32, 128)}
KEY = ShapeKey((16, 1), 512, 0, False, packed=True)


def opened(folder: Path) -> Pipeline:
    pipeline = open_pipeline(EngineOptions(model_path=str(folder)), lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    return opened(tiny_wan_a)


def wish(name: str, steps: int = 3, **more: object) -> dict[str, object]:
    width, height = SIZES[name]
    still = {"num_frames": 1, "num_inference_steps": steps, "seed": len(name), "prompt": name}
    return {**still, "width": width, "height": height, **more}


def run(pipeline: Pipeline, *names: str, **more: object) -> Bench:
    bench = Bench(pipeline)
    for name in names:
        bench.add(name, **wish(name, **more))  # type: ignore[arg-type]
    bench.run()
    assert not bench.errors
    return bench


FAMILIES = ["tiny_flux2_klein", "tiny_sd3_a", "tiny_qwen_image_a", "tiny_z_image_a"]


@pytest.mark.parametrize(
    "family",
    ["tiny_wan_a", "tiny_flux_a", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES)],
)
def test_three_sizes_in_one_pass_equal_each_alone(
    request: pytest.FixtureRequest, family: str
) -> None:
    """With guidance, if the family has any, and prompts of different lengths."""
    pipeline = opened(request.getfixturevalue(family))
    together = run(pipeline, *SIZES, steps=2)
    assert together.count("packed_forwards_total", sizes="3") == 2
    assert together.count("denoise_forwards_total", rows="3") == 2
    for name in SIZES:
        (alone,) = run(pipeline, name, steps=2).latents[name]
        (packed,) = together.latents[name]
        assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_sizes_join_and_leave_between_steps(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    long = bench.add("square", **wish("square", steps=6))
    while not long.encoded or long.step < 2:
        bench.runner.step()
    bench.add("wide", **wish("wide", steps=2))
    bench.run()
    assert bench.count("packed_forwards_total", sizes="2") == 2
    for name, steps in (("square", 6), ("wide", 2)):
        (alone,) = run(pipeline, name, steps=steps).latents[name]
        assert (bench.latents[name][0] - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_rows_of_one_size_are_a_plain_batch(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    for name in ("a", "b"):
        bench.add(name, **wish("wide", prompt=name))
    bench.run()
    assert bench.count("denoise_forwards_total", rows="2") == 3
    assert bench.count("packed_forwards_total") == 0


@pytest.mark.parametrize(
    "more", [{"num_frames": 5}, {"enable_teacache": True, "teacache_threshold": 0.1}]
)
def test_what_does_not_combine_is_not_packed(pipeline: Pipeline, more: dict[str, object]) -> None:
    bench = Bench(pipeline)
    for name in SIZES:
        job = bench.add(name, **{**wish(name), **more})
        assert not job.packs
    bench.run()
    assert not bench.errors and bench.count("packed_forwards_total") == 0


def test_an_operator_can_turn_it_off(pipeline: Pipeline) -> None:
    bench = Bench(pipeline, packing=False)
    for name in SIZES:
        bench.add(name, **wish(name))
    bench.run()
    assert not bench.errors and bench.count("packed_forwards_total") == 0


def sized(edge: int) -> ResolvedParams:
    return dataclasses.replace(PARAMS, width=edge, height=edge)


@pytest.mark.parametrize(
    ("flat", "taken"), [(0.0, [1, 1, 1]), (10.0, [3, 3, 3])], ids=["full device", "idle device"]
)
def test_batches_pay_by_their_tokens(flat: float, taken: list[int]) -> None:
    """Where every token costs the same the small picture goes first; where a step costs the same
    whatever is in it, all go at once."""
    costs, waiting = Costs(), [Waiting(sized(edge), 1) for edge in (256, 512, 1024)]

    def step(rows: int) -> None:
        chosen = [one.params for one in waiting[:rows]]
        tokens = sum(params.width * params.height / 256 for params in chosen)
        costs.add(KEY, chosen, flat + tokens / 1000)

    for rows in (1, 2, 3):
        step(rows)
    sizes = []
    for _ in taken:
        sizes.append(costs.share(KEY, waiting, 8).rows)
        step(sizes[-1])
    assert sizes == taken


def test_a_total_far_from_what_was_measured_is_tried() -> None:
    costs = Costs()
    costs.add(KEY, [sized(256)], 0.1)
    costs.add(KEY, [sized(2048)], 6.0)
    pair = [Waiting(sized(256), 1), Waiting(sized(256), 1)]
    assert costs.share(KEY, pair, 8).rows == 2
    costs.add(KEY, [sized(256)] * 2, 0.2)  # nothing was gained
    assert costs.share(KEY, pair, 8).rows == 1


def test_the_memory_counts_every_row_by_its_size() -> None:
    room = Room()
    small, large = sized(256), sized(512)
    one, four = (
        FOOTPRINT.row_bytes(FOOTPRINT.cells(params), False, 0) for params in (small, large)
    )
    for waiting, need, rows in (
        ([Waiting(small, 1), Waiting(large, 2)], 2 * (one + four), 2),  # twice: they are packed
        ([Waiting(small, 3)], 2 * one, 2),
    ):
        room.footprint = dataclasses.replace(FOOTPRINT, room=int(need))
        assert room.rows([], KEY, waiting, 8) == rows
        room.footprint = dataclasses.replace(FOOTPRINT, room=int(need) - 1)
        assert room.rows([], KEY, waiting, 8) == rows - 1
