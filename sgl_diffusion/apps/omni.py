"""The omni app: one stage that reads text, pictures, films and sound, that writes and speaks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sgl_diffusion.base.omni import OmniOptions
from sgl_diffusion.orchestrator.messages import Payload
from sgl_diffusion.orchestrator.topology import App, StageSpec

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.stage import Outbox, Worker


_NAMES = [field.name for field in dataclasses.fields(OmniOptions)]


def omni_app(options: OmniOptions) -> App:
    """The stages of a served omni model. Imports no torch: the stage process does."""
    stage = StageSpec(
        name="thinker",
        entry="sgl_diffusion.apps.omni:make_worker",
        config={"options": {name: getattr(options, name) for name in _NAMES}},
    )
    return App(name="omni", stages=(stage,))


def make_worker(config: Payload, outbox: Outbox) -> Worker:
    """Build the worker of the stage, inside the stage process."""
    from sgl_diffusion.ar.thinker import written_precision
    from sgl_diffusion.ar.worker import ChatLimits, ChatWorker
    from sgl_diffusion.base.device import pick_device, pick_dtype
    from sgl_diffusion.loader.hub import SAFE_FILES, resolve_model

    options = OmniOptions(**config["options"])
    device = pick_device(options.device)
    folder = resolve_model(
        options.model_path,
        options.revision,
        allow=(*SAFE_FILES, "*.jinja"),
        note=outbox.loading,
    )
    return ChatWorker(
        folder,
        options.model_name,
        ChatLimits(
            rows=options.max_batch_rows,
            length=options.max_sequence_length,
            prefix_bytes=int(options.max_prefix_memory * 2**30),
            media_bytes=int(options.max_media_memory * 2**30),
            speech=options.speech,
        ),
        outbox,
        device=device,
        dtype=pick_dtype(options.precision, device, auto=written_precision(folder)),
    )
