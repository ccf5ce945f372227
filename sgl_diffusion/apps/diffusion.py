"""The diffusion app: one fused stage that encodes, denoises and decodes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.orchestrator.messages import Payload
from sgl_diffusion.orchestrator.topology import App, StageSpec

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.stage import Outbox, Worker


def diffusion_app(options: EngineOptions) -> App:
    """The stages of a served diffusion model. Imports no torch: the stage process does."""
    names = [field.name for field in dataclasses.fields(EngineOptions)]
    config = {name: getattr(options, name) for name in names}
    return App(
        name="diffusion",
        stages=(
            StageSpec(
                name="diffusion", entry="sgl_diffusion.apps.diffusion:make_worker", config=config
            ),
        ),
    )


def make_worker(config: Payload, outbox: Outbox) -> Worker:
    """Build the worker of the stage, inside the stage process."""
    from sgl_diffusion.engine.worker import DiffusionWorker
    from sgl_diffusion.recipes.registry import open_pipeline

    options = EngineOptions(**config)
    return DiffusionWorker(lambda note: open_pipeline(options, note), options, outbox)
