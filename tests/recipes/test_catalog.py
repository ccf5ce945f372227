"""The list of published models agrees with the recipes it speaks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.recipes.catalog import CATALOG
from sgl_diffusion.recipes.registry import NATIVE, open_pipeline
from tests.checkpoints.tiny_wan import Build

# A tiny checkpoint of the kind that each of these is.
TINY = {
    "black-forest-labs/FLUX.1-dev": "tiny_flux_a",
    "black-forest-labs/FLUX.1-schnell": "tiny_flux_b",
    "black-forest-labs/FLUX.1-Kontext-dev": "tiny_kontext",
    "black-forest-labs/FLUX.2-dev": "tiny_flux2_dev",
    "black-forest-labs/FLUX.2-klein-4B": "tiny_flux2_klein",
    "black-forest-labs/FLUX.2-klein-base-4B": "tiny_flux2_klein_base",
    "Qwen/Qwen-Image": "tiny_qwen_image_a",
    "stabilityai/stable-diffusion-3.5-large": "tiny_sd3_a",
    "Tongyi-MAI/Z-Image": "tiny_z_image_b",
    "Tongyi-MAI/Z-Image-Omni-Base": "tiny_z_image_omni_a",
    "Tongyi-MAI/Z-Image-Turbo": "tiny_z_image_a",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "tiny_wan_a",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "i2v",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "t2v-experts",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "i2v-experts",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "ti2v",
}


def test_every_pipeline_class_with_a_recipe_is_listed() -> None:
    assert {entry.pipeline_class for entry in CATALOG} == set(NATIVE)
    assert len({entry.model for entry in CATALOG}) == len(CATALOG)
    assert all(entry.defaults.num_inference_steps > 0 for entry in CATALOG)


@pytest.mark.parametrize("entry", [e for e in CATALOG if e.model in TINY], ids=lambda e: e.model)
def test_what_is_listed_is_what_the_card_says(entry, request: pytest.FixtureRequest) -> None:
    name = TINY[entry.model]
    if name.startswith("tiny_"):
        path = request.getfixturevalue(name)
    else:
        build: Build = request.getfixturevalue("tiny_wan_kind")
        path = build(name)
    card = open_pipeline(EngineOptions(model_path=str(path)), lambda note: None).card
    assert (card.family, card.pipeline_class) == (entry.family, entry.pipeline_class)
    assert card.tasks == entry.tasks
    # A tiny table of positions has no room for the usual size.
    width = min(entry.defaults.width, card.max_edge)
    height = min(entry.defaults.height, card.max_edge)
    assert card.defaults == replace(entry.defaults, width=width, height=height)
