"""The omni app: stages that prepare, see and hear, think, talk, and make sound.

Which stages there are is code; which of them share a process is configuration.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.omni import OMNI_MODELS, OmniOptions, written_precision
from sgl_diffusion.base.registry import suggest
from sgl_diffusion.orchestrator.messages import Payload
from sgl_diffusion.orchestrator.topology import App, StageSpec

if TYPE_CHECKING:
    from sgl_diffusion.orchestrator.stage import GraphOutbox, Worker

log = get_logger(__name__)

STAGES = ("preprocess", "encoders", "thinker", "talker", "code2wav")
_SPEAKING = ("talker", "code2wav")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_NAMES = [field.name for field in dataclasses.fields(OmniOptions)]


@dataclass(frozen=True)
class Place:
    """A process: its stages, and where they run if not where the others do."""

    stages: tuple[str, ...]
    device: str | None = None

    @property
    def name(self) -> str:
        return "+".join(self.stages)


def omni_app(options: OmniOptions) -> App:
    """The processes of a served omni model. Imports no torch: they do."""
    found = placement(options)
    if options.cuda_graphs and any((place.device or options.device) == "cpu" for place in found):
        raise _no_graphs()
    places = {stage: place.name for place in found for stage in place.stages}
    values = {name: getattr(options, name) for name in _NAMES}
    specs = [
        StageSpec(
            name=place.name,
            entry="sgl_diffusion.apps.omni:make_worker",
            config={
                "options": {**values, "device": place.device or options.device},
                "stages": list(place.stages),
                "places": places,
            },
        )
        for place in found
    ]
    return App(name="omni", stages=tuple(specs))


def placement(options: OmniOptions) -> list[Place]:
    """Which stages share a process, that of the first stage first."""
    wanted = STAGES if options.speech else tuple(s for s in STAGES if s not in _SPEAKING)
    places: list[Place] = []
    placed: set[str] = set()
    for told in options.process:
        group, at, device = told.partition("@")
        names = [name.strip() for name in group.split(",")]
        for name in names:
            if name not in STAGES:
                raise ConfigError(
                    f"There is no stage {name!r}.", hint=suggest(name, STAGES), param="process"
                )
            if name in placed:
                raise ConfigError(f"Stage {name} is placed twice.", param="process")
            placed.add(name)
        if at and not _DEVICE.fullmatch(device):
            raise ConfigError(
                f"There is no device {device!r}.", hint="Say cpu, cuda or cuda:1.", param="process"
            )
        stages = tuple(stage for stage in wanted if stage in names)
        places.append(Place(stages, device or None))
    places.append(Place(tuple(stage for stage in wanted if stage not in placed)))
    running = [place for place in places if place.stages]
    return sorted(running, key=lambda place: STAGES.index(place.stages[0]))


def _no_graphs() -> ConfigError:
    return ConfigError(
        "There are no CUDA graphs on cpu.",
        hint="Leave out --cuda-graphs, or name a GPU.",
        param="cuda_graphs",
    )


def make_worker(config: Payload, outbox: GraphOutbox) -> Worker:
    """Build the worker of some stages, inside their process."""
    import torch

    from sgl_diffusion.ar.decoding import cuda_graph
    from sgl_diffusion.ar.stages.part import ChatLimits, Setting
    from sgl_diffusion.ar.worker import ChatWorker
    from sgl_diffusion.base.device import pick_device, pick_dtype, unused_gpu
    from sgl_diffusion.loader.hub import SAFE_FILES, resolve_model
    from sgl_diffusion.loader.index import read_config

    options = OmniOptions(**{**config["options"], "process": ()})
    device = pick_device(options.device)
    if text := unused_gpu(options.device):
        log.warning(text)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif options.cuda_graphs:
        raise _no_graphs()
    folder = resolve_model(
        options.model_path,
        options.revision,
        allow=(*SAFE_FILES, "*.jinja", "spk_dict.pt"),
        note=outbox.loading,
        known=OMNI_MODELS,
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
        dtype=pick_dtype(options.precision, device, auto=written_precision(read_config(folder))),
        record=cuda_graph if options.cuda_graphs else None,
    )
    return ChatWorker(setting, outbox, stages=config["stages"], elsewhere=config["places"])
