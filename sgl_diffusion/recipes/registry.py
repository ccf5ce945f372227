"""Which recipe serves a model: by the pipeline class that its model_index.json names."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.registry import Registry
from sgl_diffusion.base.startup import spent_on
from sgl_diffusion.engine.exclusions import check_options
from sgl_diffusion.loader.files import other_weights
from sgl_diffusion.recipes import demo
from sgl_diffusion.recipes.beside import own_adapters, own_defaults

if TYPE_CHECKING:
    from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline
    from sgl_diffusion.loader.index import ModelIndex

log = get_logger(__name__)

Note = Callable[[str], None]

# Pipeline class to the module whose `open_pipeline(index, options, name)` assembles it natively.
NATIVE: Registry[str] = Registry(
    "native recipe",
    {
        "Flux2KleinPipeline": "sgl_diffusion.recipes.flux2",
        "Flux2Pipeline": "sgl_diffusion.recipes.flux2",
        "FluxKontextPipeline": "sgl_diffusion.recipes.flux",
        "FluxPipeline": "sgl_diffusion.recipes.flux",
        "QwenImageEditPipeline": "sgl_diffusion.recipes.qwen_image",
        "QwenImageEditPlusPipeline": "sgl_diffusion.recipes.qwen_image",
        "QwenImagePipeline": "sgl_diffusion.recipes.qwen_image",
        "StableDiffusion3Pipeline": "sgl_diffusion.recipes.sd3",
        "ZImageOmniPipeline": "sgl_diffusion.recipes.z_image_omni",
        "ZImagePipeline": "sgl_diffusion.recipes.z_image",
        "WanImageToVideoPipeline": "sgl_diffusion.recipes.wan",
        "WanPipeline": "sgl_diffusion.recipes.wan",
    },
)

# Pipelines of diffusers that hand other inputs to the same parts: one recipe takes what both take.
SAME_PARTS = {
    "Flux2KleinInpaintPipeline": "Flux2KleinPipeline",
    "FluxImg2ImgPipeline": "FluxPipeline",
    "FluxInpaintPipeline": "FluxPipeline",
    "FluxKontextInpaintPipeline": "FluxKontextPipeline",
    "QwenImageEditInpaintPipeline": "QwenImageEditPipeline",
    "QwenImageImg2ImgPipeline": "QwenImagePipeline",
    "QwenImageInpaintPipeline": "QwenImagePipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
    "ZImageImg2ImgPipeline": "ZImagePipeline",
    "ZImageInpaintPipeline": "ZImagePipeline",
}


def open_pipeline(options: EngineOptions, note: Note) -> Pipeline | WholePipeline:
    """Find, choose and load the model of `options`; `note` hears what is going on."""
    from sgl_diffusion.loader.index import read_index

    check_options(options)
    folder = find_model(options, note)
    index = _with_other_weights(read_index(folder, options.variant), options)
    pipeline = _open(index, options, options.model_path or demo.NAME, note)
    card = pipeline.card
    pipeline.card = dataclasses.replace(
        card,
        defaults=own_defaults(folder, card.defaults),
        adapters=own_adapters(folder),
        note=demo.NOTE if options.model_path is None else card.note,
    )
    return pipeline


def find_model(options: EngineOptions, note: Note) -> Path:
    """The folder of the model of `options`, fetched if it is not there."""
    if options.model_path is None:
        return demo.FOLDER
    from sgl_diffusion.loader.hub import resolve_model
    from sgl_diffusion.recipes.catalog import NAMES

    note(f"looking for {options.model_path}")
    return resolve_model(
        options.model_path, options.revision, variant=options.variant, note=note, known=NAMES
    )


def _with_other_weights(index: ModelIndex, options: EngineOptions) -> ModelIndex:
    """The model with the weights that the operator names for its transformers."""
    for name, weights in other_weights(options).items():
        index = index.with_weights(name, weights)
    return index


def _open(
    index: ModelIndex, options: EngineOptions, name: str, note: Note
) -> Pipeline | WholePipeline:
    """Natively where a recipe exists and can take this checkpoint, else through diffusers."""
    if options.backend != "diffusers":
        native = dataclasses.replace(index, pipeline=SAME_PARTS.get(index.pipeline, index.pipeline))
        reason = _not_native(native)
        if reason is None:
            from sgl_diffusion.recipes.open_native import open_native

            note(f"loading {index.pipeline} with the native recipe")
            recipe = importlib.import_module(NATIVE.get(native.pipeline))
            _import_libraries(native)
            return open_native(recipe.open_pipeline, native, options, name, note)
        if options.backend == "native":
            raise ConfigError(
                f"{index.pipeline} cannot be served natively: {reason}.",
                hint="Use --backend auto or --backend diffusers.",
                param="backend",
            )
        log.info("%s goes through the diffusers fallback: %s", index.pipeline, reason)
    from sgl_diffusion.recipes.fallback import open_fallback

    note(f"loading {index.pipeline} with diffusers")
    return open_fallback(index, options, name)


def _import_libraries(index: ModelIndex) -> None:
    """What the recipe imports anyway, so that the log of the start tells it from loading."""
    with spent_on("imports"):
        for name, part in index.components.items():
            ours = name.startswith(("transformer", "scheduler"))
            if part.library in ("diffusers", "transformers") and not ours:
                getattr(importlib.import_module(part.library), part.class_name, None)


def _not_native(index: ModelIndex) -> str | None:
    """Why no recipe of ours can serve this checkpoint; None if one can."""
    if index.pipeline not in NATIVE:
        return f"there are native recipes for {', '.join(NATIVE.names())}"
    recipe = importlib.import_module(NATIVE.get(index.pipeline))
    reason: str | None = recipe.not_supported(index)
    return reason
