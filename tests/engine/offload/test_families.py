"""With weights that are away until they are needed, every family computes the same latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench

ALL = {
    "dit_layerwise_offload": True,
    "text_encoder_cpu_offload": True,
    "vae_cpu_offload": True,
}


def opened(path: Path, **options: bool) -> Pipeline:
    chosen = EngineOptions(model_path=str(path), **options)
    pipeline = open_pipeline(chosen, lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


def made(pipeline: Pipeline) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The latents of two jobs side by side, and the frames of one."""
    bench = Bench(pipeline)
    size = {"width": 64, "height": 64, "num_inference_steps": 3}
    frames = 5 if pipeline.card.makes_video else 1
    bench.add("a", **size, num_frames=frames, seed=1)
    bench.add("b", **size, num_frames=frames, seed=2, prompt="a small black car")
    bench.run()
    assert not bench.errors, bench.errors
    latents = [row for name in ("a", "b") for row in bench.latents[name]]
    return latents, bench.outbox.outputs["a"][0]


QUICK = ["tiny_flux_a"]
OTHERS = ["tiny_wan_a", "tiny_flux2_klein", "tiny_qwen_image_a", "tiny_sd3_a", "tiny_z_image_a"]


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_the_same(family: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(family)
    whole, frames = made(opened(path))
    latents, others = made(opened(path, **ALL))
    for one, other in zip(whole, latents, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(frames, others)
