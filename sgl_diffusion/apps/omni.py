"""The omni app: stages that prepare, see and hear, think, talk, and make sound.

Which stages there are is code; which of them share a process is configuration.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.omni import OmniOptions
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.orchestrator.messages import Payload
from sgl_diffusion.orchestrator.topology import App, StageSpec

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.stage import GraphOutbox, Worker

STAGES = ("preprocess", "encoders", "thinker", "talker", "code2wav")
_SPEAKING = ("talker", "code2wav")
_NAMES = [field.name for field in dataclasses.fields(OmniOptions)]


def omni_app(options: OmniOptions) -> App:
    """The processes of a served omni model. Imports no torch: they do."""
    groups = placement(options)
    places = {stage: _name(group) for group in groups for stage in group}
    values = {name: getattr(options, name) for name in _NAMES}
    specs = [
        StageSpec(
            name=_name(group),
            entry="sgl_diffusion.apps.omni:make_worker",
            config={"options": values, "stages": list(group), "places": places},
        )
        for group in groups
    ]
    return App(name="omni", stages=tuple(specs))


def placement(options: OmniOptions) -> list[tuple[str, ...]]:
    """Which stages share a process, that of the first stage first."""
    wanted = STAGES if options.speech else tuple(s for s in STAGES if s not in _SPEAKING)
    groups: list[tuple[str, ...]] = []
    for told in options.process:
        names = [name.strip() for name in told.split(",")]
        for name in names:
            if name not in STAGES:
                raise ConfigError(
                    f"There is no stage {name!r}.", hint=suggest(name, STAGES), param="process"
                )
            if any(name in group for group in groups) or names.count(name) > 1:
                raise ConfigError(f"Stage {name} is placed twice.", param="process")
        groups.append(tuple(stage for stage in wanted if stage in names))
    placed = {stage for group in groups for stage in group}
    groups.append(tuple(stage for stage in wanted if stage not in placed))
    return sorted(filter(None, groups), key=lambda group: STAGES.index(group[0]))


def _name(group: tuple[str, ...]) -> str:
    return "+".join(group)


def make_worker(config: Payload, outbox: GraphOutbox) -> Worker:
    """Build the worker of some stages, inside their process."""
    from sgl_diffusion.ar.stages.part import ChatLimits, Setting
    from sgl_diffusion.ar.thinker import written_precision
    from sgl_diffusion.ar.worker import ChatWorker
    from sgl_diffusion.base.device import pick_device, pick_dtype
    from sgl_diffusion.loader.hub import SAFE_FILES, resolve_model

    options = OmniOptions(**{**config["options"], "process": ()})
    device = pick_device(options.device)
    folder = resolve_model(
        options.model_path,
        options.revision,
        allow=(*SAFE_FILES, "*.jinja", "spk_dict.pt"),
        note=outbox.loading,
    )
    limits = ChatLimits(
        rows=options.max_batch_rows,
        length=options.max_sequence_length,
        prefix_bytes=int(options.max_prefix_memory * 2**30),
        media_bytes=int(options.max_media_memory * 2**30),
        speech=options.speech,
        look_ahead=options.speech_look_ahead,
    )
    setting = Setting(
        folder=folder,
        name=options.model_name or "",
        limits=limits,
        device=device,
        dtype=pick_dtype(options.precision, device, auto=written_precision(folder)),
    )
    return ChatWorker(setting, outbox, stages=config["stages"], elsewhere=config["places"])
