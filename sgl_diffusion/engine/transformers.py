"""What of a pipeline denoises, and of that the transformers that are ours."""

from __future__ import annotations

from typing import Any

from torch import nn

from sgl_diffusion.engine.parallel.families import FAMILIES
from sgl_diffusion.engine.pipeline import AdaptablePipeline, Pipeline, WholePipeline


def transformers(pipeline: Pipeline | WholePipeline) -> list[Any]:
    """Modules whose types are in `FAMILIES`: the engine knows their blocks. None where the model
    runs from end to end."""
    if not isinstance(pipeline, AdaptablePipeline):
        return []
    modules = [part.module for part in pipeline.adaptables().values()]
    return [module for module in modules if type(module) in FAMILIES]


def denoisers(pipeline: Pipeline) -> list[nn.Module]:
    """Modules that steps run: all that adapters can change, but the encoders of prompts."""
    if not isinstance(pipeline, AdaptablePipeline):
        return []
    parts = pipeline.adaptables().items()
    return [part.module for name, part in parts if not name.startswith("text_encoder")]
