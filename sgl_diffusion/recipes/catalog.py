"""The published models that the native recipes were written for, as `sglang models` lists them.

A repository that is not here is served all the same where its pipeline class has a recipe. The
defaults stay in the recipes; this file says where.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from sgl_diffusion.base.params import SamplingDefaults

_RECIPES = "sgl_diffusion.recipes."


@dataclass(frozen=True)
class Entry:
    """`where` is the module and the name of the defaults."""

    model: str
    family: str
    pipeline_class: str
    tasks: tuple[str, ...]
    where: str

    @property
    def defaults(self) -> SamplingDefaults:
        """From the recipe, which imports torch."""
        module, _, name = self.where.partition(":")
        defaults = getattr(importlib.import_module(_RECIPES + module), name)
        assert isinstance(defaults, SamplingDefaults)
        return defaults


_WAN, _I2V = "WanPipeline", "WanImageToVideoPipeline"
_FROM_TEXT, _FROM_PICTURE = ("T2V", "T2I", "TI2I"), ("I2V",)

CATALOG = (
    Entry("black-forest-labs/FLUX.1-dev", "flux", "FluxPipeline", ("T2I",), "flux:DEV"),
    Entry("black-forest-labs/FLUX.1-schnell", "flux", "FluxPipeline", ("T2I",), "flux:SCHNELL"),
    Entry(
        "black-forest-labs/FLUX.1-Kontext-dev",
        "flux",
        "FluxKontextPipeline",
        ("T2I", "TI2I"),
        "flux:DEV",
    ),
    Entry("black-forest-labs/FLUX.2-dev", "flux2", "Flux2Pipeline", ("T2I", "TI2I"), "flux2:DEV"),
    Entry(
        "black-forest-labs/FLUX.2-klein-4B",
        "flux2",
        "Flux2KleinPipeline",
        ("T2I", "TI2I"),
        "flux2:KLEIN",
    ),
    Entry(
        "black-forest-labs/FLUX.2-klein-base-4B",
        "flux2",
        "Flux2KleinPipeline",
        ("T2I", "TI2I"),
        "flux2:KLEIN_BASE",
    ),
    Entry("Qwen/Qwen-Image", "qwen-image", "QwenImagePipeline", ("T2I",), "qwen_image:DEFAULTS"),
    Entry(
        "Qwen/Qwen-Image-Edit",
        "qwen-image",
        "QwenImageEditPipeline",
        ("TI2I",),
        "qwen_image:EDIT_DEFAULTS",
    ),
    Entry(
        "Qwen/Qwen-Image-Edit-2509",
        "qwen-image",
        "QwenImageEditPlusPipeline",
        ("TI2I",),
        "qwen_image:EDIT_DEFAULTS",
    ),
    Entry(
        "stabilityai/stable-diffusion-3.5-large",
        "sd3",
        "StableDiffusion3Pipeline",
        ("T2I",),
        "sd3:DEFAULTS",
    ),
    Entry("Tongyi-MAI/Z-Image-Turbo", "z-image", "ZImagePipeline", ("T2I",), "z_image:TURBO"),
    Entry("Tongyi-MAI/Z-Image", "z-image", "ZImagePipeline", ("T2I",), "z_image:BASE"),
    Entry(
        "Tongyi-MAI/Z-Image-Omni-Base",
        "z-image",
        "ZImageOmniPipeline",
        ("T2I", "TI2I"),
        "z_image:BASE",
    ),
    Entry("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan", _WAN, _FROM_TEXT, "wan_defaults:SMALL"),
    Entry("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan", _WAN, _FROM_TEXT, "wan_defaults:LARGE"),
    Entry("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "wan", _I2V, _FROM_PICTURE, "wan_defaults:SMALL"),
    Entry("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "wan", _I2V, _FROM_PICTURE, "wan_defaults:LARGE"),
    Entry("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "wan", _WAN, _FROM_TEXT, "wan_defaults:EXPERTS_T2V"),
    Entry(
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers", "wan", _I2V, _FROM_PICTURE, "wan_defaults:EXPERTS_I2V"
    ),
    Entry(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        "wan",
        _WAN,
        ("T2V", "I2V", "T2I"),
        "wan_defaults:FIRST_FRAME",
    ),
)

NAMES = tuple(entry.model for entry in CATALOG)
