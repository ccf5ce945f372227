"""The transformers of a pipeline that are ours: the engine knows its way about their blocks."""

from __future__ import annotations

from typing import Any

from sgl_diffusion.engine.parallel.families import FAMILIES
from sgl_diffusion.engine.pipeline import AdaptablePipeline, Pipeline, WholePipeline


def transformers(pipeline: Pipeline | WholePipeline) -> list[Any]:
    """Modules whose types are in `FAMILIES`; none where the model runs from end to end."""
    if not isinstance(pipeline, AdaptablePipeline):
        return []
    modules = [part.module for part in pipeline.adaptables().values()]
    return [module for module in modules if type(module) in FAMILIES]
