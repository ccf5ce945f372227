"""What the tests of the image recipes share: a job through the whole engine beside diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.recipes import flux, qwen_image
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench

PROMPT = "a red fox sleeping in the garden, a small black car and a big green bird, oil painting"
NEGATIVE = "blurry, low quality"
Result = tuple[Tensor, Tensor]  # latents, picture


def opened(path: Path) -> Pipeline:
    """The native pipeline of a repository folder."""
    pipeline = open_pipeline(EngineOptions(model_path=str(path)), lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


def run(pipeline: Pipeline, **wish: Any) -> Result:
    """The final latents [1, C, 1, h, w] and the picture [H, W, 3] of one job."""
    bench = Bench(pipeline)
    bench.add("job", **{"num_frames": 1, **wish})
    bench.run()
    assert not bench.errors, bench.errors
    return bench.latents["job"][0], bench.outbox.outputs["job"][0][0]


def assert_equal(ours: Result, theirs: Result) -> None:
    """`theirs` with latents as diffusers keeps them, packed or not."""
    expected = unpacked(theirs[0], like=ours[0])
    assert 0.3 < expected.std() < 10, "the comparison means something for latents of order 1"
    assert (ours[0] - expected).abs().max() <= 1e-4
    assert ours[1].shape == theirs[1].shape
    assert (ours[1].int() - theirs[1].int()).abs().max() <= 1


def unpacked(latents: Tensor, like: Tensor) -> Tensor:
    """Latents of diffusers, [1, C, h, w] or tokens of one or of 2x2 of them, as the engine's."""
    if latents.dim() == 5:
        return latents
    if latents.dim() == 4:
        return latents[:, :, None]
    height, width = like.shape[3:]
    if latents.shape[1] == height * width:
        return latents.transpose(1, 2).unflatten(-1, (1, height, width))
    patches = latents.transpose(1, 2).unflatten(-1, (height // 2, width // 2))
    return torch.nn.functional.pixel_shuffle(patches, 2)[:, :, None]


def together(pipeline: Pipeline, prompts: dict[str, str], **wish: Any) -> dict[str, Tensor]:
    """Final latents of jobs that ran side by side, in batches of more than one."""
    bench = Bench(pipeline)
    for name, prompt in prompts.items():
        bench.add(name, **{"num_frames": 1, **wish, "prompt": prompt})
    bench.run()
    forwards = bench.count("denoise_forwards_total")
    assert forwards > bench.count("denoise_forwards_total", rows="1")
    return {name: bench.latents[name][0] for name in prompts}


class _Exact(Tensor):
    """A picture that stays as exact as it is."""

    def bfloat16(self, *args: Any, **options: Any) -> Tensor:
        return self.as_subclass(Tensor)


def keep_full_precision(pipe: Any) -> None:
    """diffusers' Z-Image Omni hands its VAE pictures in bf16, whatever the VAE's own precision."""
    preprocess = pipe.image_processor.preprocess
    pipe.image_processor.preprocess = lambda *args, **options: preprocess(
        *args, **options
    ).as_subclass(_Exact)


def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides bring reference pictures to smaller sizes, which is what takes the time."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as kontext
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

    sizes = [(w // 16 * 2 // 16 * 16, h // 16 * 2 // 16 * 16) for w, h in flux._TRAINED]
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    monkeypatch.setattr(flux, "_TRAINED", sizes)
    size = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: size(area // 64, ratio))
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", 128 * 128)
    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", 96 * 96)
    monkeypatch.setattr(qwen_image, "_AREA", 128 * 128)
    monkeypatch.setattr(qwen_image, "_SMALL_AREA", 96 * 96)
