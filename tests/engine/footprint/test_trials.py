"""What was counted at a few sizes is what whole jobs of other sizes take of the allocator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.footprint.trials import measure
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.checkpoints.tiny_wan import Build
from tests.engine.bench import Bench
from tests.engine.footprint.recorded import recording

QUICK = ["tiny_flux_a", "tiny_wan_a"]
OTHERS = ["tiny_flux2_klein", "tiny_qwen_image_a", "tiny_sd3_a", "tiny_z_image_a"]
# Larger or smaller than the trials, and not square; frames where there are any.
PICTURE = {"width": 640, "height": 448, "num_frames": 1, "num_inference_steps": 2}
CLIP = {"width": 320, "height": 256, "num_frames": 13, "num_inference_steps": 2}


def opened(path: Path) -> Pipeline:
    pipeline = open_pipeline(EngineOptions(model_path=str(path)), lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


def real_over_foretold(pipeline: Pipeline, **wish: Any) -> float:
    footprint = measure(pipeline)
    bench = Bench(pipeline, overlap=False)
    unit = pipeline.card.size_multiple
    # What libraries take when they first run is none of the job's.
    small = {"width": unit, "height": unit, "num_frames": 1, "num_inference_steps": 2}
    bench.add("first", **{**wish, **small})
    bench.run()
    edge = pipeline.card.max_edge
    wish = {**wish, "width": min(wish["width"], edge), "height": min(wish["height"], edge)}
    job = bench.add("job", **wish)
    with recording() as found:
        bench.run()
    assert not bench.errors, bench.errors
    return found.peak / footprint.job_bytes(job.params)


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_pictures(family: str, request: pytest.FixtureRequest) -> None:
    pipeline = opened(request.getfixturevalue(family))
    assert 0.85 <= real_over_foretold(pipeline, **PICTURE) <= 1.15


@pytest.mark.parametrize("kind", ["t2v-experts", pytest.param("ti2v", marks=pytest.mark.slow)])
def test_clips(kind: str, tiny_wan_kind: Build) -> None:
    assert 0.85 <= real_over_foretold(opened(tiny_wan_kind(kind)), **CLIP) <= 1.15


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["i2v", "ti2v", "flf2v"])
def test_clips_from_a_picture(kind: str, tiny_wan_kind: Build, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "red").save(path)
    pipeline = opened(tiny_wan_kind(kind))
    images = (str(path),) * max(pipeline.card.min_images, 1)
    assert 0.85 <= real_over_foretold(pipeline, **CLIP, images=images) <= 1.15


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_kontext", "tiny_flux2_klein", "tiny_flux_a"])
def test_edits(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Natively, where the picture is a part of the prompt, and from a picture with noise on it."""
    path = tmp_path / "picture.png"
    Image.new("RGB", (1024, 1024), "red").save(path)
    pipeline = opened(request.getfixturevalue(family))
    assert 0.85 <= real_over_foretold(pipeline, **PICTURE, images=(str(path),)) <= 1.15
