"""The whole matrix of native pipeline classes beside diffusers', cell by cell.

The tests of each family hold the quick part of it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sgl_diffusion.recipes.registry import NATIVE
from tests.recipes import parity
from tests.recipes.matrix import PROMPTS, ROWS, Sides, checkpoint


@pytest.fixture(params=[(name, index) for name in ROWS for index in (0, 1)], ids=str)
def sides(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sides:
    name, index = request.param
    path = checkpoint(ROWS[name], index, request, tmp_path / "model")
    parity.small_references(monkeypatch)
    return Sides(ROWS[name], path, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_cell_equals_diffusers(sides: Sides) -> None:
    row = sides.row
    guidance = (row.on, row.off)
    for size, scale, count, frames in itertools.product(
        row.sizes, guidance, row.pictures, row.frames
    ):
        call = sides.call(size, frames, scale)
        prompt = PROMPTS["long"]
        latents, _ = parity.run(
            sides.ours, prompt=prompt, seed=11, images=sides.files(count), **call
        )
        expected = parity.unpacked(sides.expected(prompt, count, **call), like=latents)
        cell = f"{size} {scale} {count} pictures {frames} frames"
        assert 0.2 < expected.std() < 10, cell
        assert (latents - expected).abs().max() <= 1e-4, cell


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_prompts_in_one_batch_equal_diffusers(sides: Sides) -> None:
    row = sides.row
    call = sides.call(row.sizes[1], row.frames[-1], row.off)
    files = sides.files(row.pictures[-1])
    latents = parity.together(sides.ours, PROMPTS, seed=11, images=files, **call)
    for name, prompt in PROMPTS.items():
        expected = sides.expected(prompt, row.pictures[-1], **call)
        expected = parity.unpacked(expected, like=latents[name])
        assert (latents[name] - expected).abs().max() <= 1e-4, name


def test_the_table_has_every_class() -> None:
    assert {row.pipeline_class for row in ROWS.values()} == set(NATIVE)
