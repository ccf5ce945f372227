"""The ranks of this worker: what they make of a pipeline that was just opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sgl_diffusion.attention import select
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.params import ModelCard
from sgl_diffusion.distributed.group import Group
from sgl_diffusion.distributed.layout import Degrees, Layout
from sgl_diffusion.distributed.mesh import Mesh
from sgl_diffusion.distributed.plan import COSTS, Work, plan
from sgl_diffusion.engine.exclusions import NO_LSE
from sgl_diffusion.engine.parallel.agreement import together
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.parallel.families import FAMILIES
from sgl_diffusion.engine.parallel.tokens import spread_tokens
from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline
from sgl_diffusion.engine.transformers import transformers

T = TypeVar("T")

log = get_logger(__name__)


class Ranks:
    """`everyone` is the group on the CPU in which the first rank leads the others."""

    def __init__(self, everyone: Group, options: EngineOptions) -> None:
        self.everyone = everyone
        self._options = options

    def together(self, do: Callable[[], T]) -> T:
        return together(self.everyone, do)

    def spread(self, pipeline: Pipeline | WholePipeline) -> Branches:
        """Put the pipeline's transformers on all ranks; every rank calls it at the same time."""
        models = transformers(pipeline)
        if not models or not isinstance(pipeline, Pipeline):
            card = pipeline.card
            raise ConfigError(
                f"{card.name} runs on one device only: {card.pipeline_class} is served through "
                f"the {card.backend} backend.",
                hint="Leave --num-gpus out, and start one server per device.",
                param="num_gpus",
            )
        params = models[0].params
        work = _work(pipeline.card, models[0])
        costs = COSTS[pipeline.device.type]
        chosen = plan(open_layouts(self._options, work.heads), work, costs)
        layout = chosen.layout
        backend = select(
            self._options.attention_backend,
            device=pipeline.device,
            head_dim=params.attention_head_dim,
            dtype=models[0].dtype,
            needs_lse=layout.ring > 1,
        )
        if self.everyone.index == 0:
            log.info("%d ranks: %s (%s)", layout.ranks, chosen, costs.exchanges)
        mesh = Mesh.of(layout, self.everyone.index)
        for model in models:
            spread_tokens(model, mesh, backend)
        return Branches(mesh.branches)


def open_layouts(options: EngineOptions, heads: int) -> list[Layout]:
    """Those to choose from: without rings where attention that was asked for cannot be in one."""
    layouts = Degrees.of(options).fitting(heads)
    if options.attention_backend in NO_LSE:
        return [layout for layout in layouts if layout.ring == 1] or layouts
    return layouts


def _work(card: ModelCard, model: Any) -> Work:
    """A step of what the model makes by default."""
    family, defaults = FAMILIES[type(model)], card.defaults
    edge = card.size_multiple  # of the picture that becomes one token
    frames = (defaults.num_frames - 1) // card.frame_multiple + 1
    return Work(
        tokens=(defaults.width // edge) * (defaults.height // edge) * frames,
        heads=family.heads(model.params),
        head_dim=model.params.attention_head_dim,
        blocks=sum(len(section.blocks) for section in family.sections(model)),
        guided=card.guides,
    )
