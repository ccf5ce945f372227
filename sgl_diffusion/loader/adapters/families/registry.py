"""Finds the table of a model by the name of its diffusers class."""

from __future__ import annotations

from collections.abc import Collection

from sgl_diffusion.loader.adapters.families.flux import FLUX
from sgl_diffusion.loader.adapters.families.flux2 import FLUX2
from sgl_diffusion.loader.adapters.families.ltx2 import LTX2
from sgl_diffusion.loader.adapters.families.qwen_image import QWEN_IMAGE
from sgl_diffusion.loader.adapters.families.sd3 import SD3
from sgl_diffusion.loader.adapters.families.unet import UNET, original_names
from sgl_diffusion.loader.adapters.families.wan import WAN
from sgl_diffusion.loader.adapters.families.z_image import Z_IMAGE
from sgl_diffusion.loader.adapters.names import Family, generic

FAMILIES = {
    "WanTransformer3DModel": WAN,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "ZImageTransformer2DModel": Z_IMAGE,
    "SD3Transformer2DModel": SD3,
    "LTX2VideoTransformer3DModel": LTX2,
}


def family_of(transformer_class: str, modules: Collection[str] = ()) -> Family:
    """The table of a transformer class; for one without a table, its own `modules` are the names
    that flat keys may have."""
    if family := FAMILIES.get(transformer_class):
        return family
    layers = original_names(modules) if transformer_class == UNET else ()
    return generic(transformer_class, modules, layers)
