"""Image-to-image of every native image family, against diffusers' own pipelines for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sgl_diffusion.engine.pictures import to_pixels
from sgl_diffusion.engine.pipeline import Pipeline
from tests.oracles import images as oracle
from tests.recipes.parity import opened, run, unpacked

PROMPT = "a red fox sleeping in the garden"
WIDTH, HEIGHT = 80, 64
# What guides each family at a scale that both sides take the same way.
FAMILIES: dict[str, dict[str, float]] = {
    "tiny_flux_a": {"guidance_scale": 3.5},
    "tiny_flux_b": {"guidance_scale": 3.5},
    "tiny_qwen_image_a": {"true_cfg_scale": 1.0},
    "tiny_sd3_a": {"guidance_scale": 3.5},
    "tiny_z_image_a": {"guidance_scale": 3.5},
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    across, down = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    path = tmp_path_factory.mktemp("pictures") / "in.png"
    Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8)).save(path)
    return str(path)


@dataclass(frozen=True)
class Both:
    """Our pipeline, diffusers' of the same files, and how they are guided."""

    ours: Pipeline
    theirs: Any
    guided: dict[str, float]

    def relative(self, auto: str) -> Any:
        """The pipeline that diffusers makes of the same parts."""
        import diffusers

        pipe = getattr(diffusers, auto).from_pipe(self.theirs)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest) -> Both:
    path: Path = request.getfixturevalue(request.param)
    theirs = oracle.pipeline(path)
    _encode_to_the_mode(theirs.vae)
    return Both(opened(path), theirs, FAMILIES[request.param])


@pytest.fixture(scope="module")
def ours(both: Both) -> Pipeline:
    return both.ours


def _encode_to_the_mode(vae: Any) -> None:
    """diffusers draws from the posterior, which its seed then does not have for the noise."""
    encode = vae.encode

    def exact(x: torch.Tensor, **options: Any) -> Any:
        result = encode(x.contiguous(), **options)
        posterior = result.latent_dist if hasattr(result, "latent_dist") else result[0]
        posterior.sample = lambda generator=None: posterior.mode()
        return result

    vae.encode = exact


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_pixels_equal_diffusers(both: Both, picture: str, strength: float) -> None:
    call = {"num_inference_steps": 5, "strength": strength, **both.guided}
    size = {"width": WIDTH, "height": HEIGHT, "max_sequence_length": 64}
    _, pixels = run(both.ours, prompt=PROMPT, seed=11, images=(picture,), **size, **call)
    theirs = both.relative("AutoPipelineForImage2Image")
    with Image.open(picture) as image:
        _, their_pixels = oracle.run(theirs, PROMPT, seed=11, image=image, **size, **call)
    assert pixels[0].float().std() > 5, "the comparison means something"
    assert (pixels.int() - their_pixels.int()).abs().max() <= 1


def test_inpainted_latents_equal_diffusers(both: Both, picture: str, tmp_path: Path) -> None:
    """With a mask of whole tokens; outside of it our pixels are the picture's own, theirs the
    decoder's."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:48, 32:64] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    call = {"num_inference_steps": 5, "strength": 0.7, **both.guided}
    size = {"width": WIDTH, "height": HEIGHT, "max_sequence_length": 64}
    files = {"images": (picture,), "mask": str(tmp_path / "mask.png")}
    latents, _ = run(both.ours, prompt=PROMPT, seed=11, **files, **size, **call)
    theirs = both.relative("AutoPipelineForInpainting")
    with Image.open(picture) as image, Image.open(files["mask"]) as where:
        given = {"image": image, "mask_image": where}
        expected, _ = oracle.run(theirs, PROMPT, seed=11, **given, **size, **call)
    expected = unpacked(expected, like=latents)
    assert expected.std() > 0.3, "the comparison means something"
    assert (latents - expected).abs().max() <= 1e-4


def test_both_ends_of_strength(ours: Pipeline, picture: str) -> None:
    call = {"prompt": PROMPT, "width": WIDTH, "height": HEIGHT, "num_inference_steps": 4}
    full, _ = run(ours, images=(picture,), strength=1.0, **call)
    assert torch.equal(full, run(ours, **call)[0])
    _, frame = run(ours, images=(picture,), strength=0.0, **call)
    with Image.open(picture) as image:
        clean = ours.encode_images(to_pixels(image, WIDTH, HEIGHT))
    assert torch.equal(frame, next(ours.decode(clean))[0])


def test_outside_a_mask_every_pixel_stays(ours: Pipeline, picture: str, tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[16:48, 24:56] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    call = {"prompt": PROMPT, "width": WIDTH, "height": HEIGHT, "num_inference_steps": 3}
    latents, frame = run(ours, images=(picture,), mask=str(tmp_path / "mask.png"), **call)
    with Image.open(picture) as image:
        given = torch.from_numpy(np.array(image))
        clean = ours.encode_images(to_pixels(image, WIDTH, HEIGHT))
    inside = torch.from_numpy(mask > 0)
    assert torch.equal(frame[~inside], given[~inside])
    assert (frame[inside].int() - given[inside].int()).abs().float().mean() > 3
    cells = inside.float()[None, None]
    free = torch.nn.functional.adaptive_max_pool2d(cells, latents.shape[-2:])[0, 0] > 0
    assert (latents[..., ~free] - clean[..., ~free]).abs().max() < 1e-5
