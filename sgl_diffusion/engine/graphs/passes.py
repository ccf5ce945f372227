"""The forward passes of a runner: replayed where there is a graph of them, else eager.

The first steps of a shape are eager; its graph is made between two units of work, so no step waits
for it. A pass that cannot be captured stays eager.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.exclusions import (
    COME_AND_GO,
    DIFFUSERS,
    ON_CPU,
    graphs_obstacle,
    refuse_graphs,
)
from sgl_diffusion.engine.graphs.arguments import signature
from sgl_diffusion.engine.graphs.capture import CapturedPass, Graph, Pass
from sgl_diffusion.engine.graphs.plan import Plan
from sgl_diffusion.engine.lora.layout import Layout
from sgl_diffusion.engine.lora.slots import Slots
from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline

log = get_logger(__name__)

# Why a step is made as ever, by the label of `graph_bypasses_total`.
BYPASSED = {
    "adapters": "adapters of single requests that are large for their number of layers",
    "step_cache": "enable_teacache",
    "sizes": "several sizes in one pass",
}

Capture = Callable[[Pass, Tensor, Tensor, Any, int], Graph]


def chosen_graphs(
    options: EngineOptions, pipeline: Pipeline | WholePipeline
) -> Literal["", "auto", "on"]:
    """When steps become graphs; whoever asks for them gets them, or is told why not."""
    reason = _obstacle(options, pipeline)
    if options.cuda_graphs == "on":
        refuse_graphs(reason)
        return "on"
    return "" if reason or options.cuda_graphs == "off" else "auto"


def _obstacle(options: EngineOptions, pipeline: Pipeline | WholePipeline) -> str:
    if not isinstance(pipeline, Pipeline):
        return DIFFUSERS
    if pipeline.device.type != "cuda":
        return ON_CPU
    if any(part.component.startswith("transformer") for part in pipeline.card.offload):
        return COME_AND_GO
    return graphs_obstacle(options)


def graphed_passes(pipeline: Pipeline, bounds: Bounds, counters: Counters) -> GraphedPasses | None:
    """Of a runner whose steps may become graphs."""
    if not bounds.graphs:
        return None
    always, budget = bounds.graphs == "on", bounds.graph_bytes
    return GraphedPasses(pipeline.velocity, counters, budget=budget, always=always)


@dataclass(frozen=True)
class Adapted:
    """A pass over so many rows that reads their adapters from slots."""

    run: Pass
    slots: Slots
    rows: int


@dataclass(frozen=True)
class _Call:
    """A pass and its arguments."""

    key: Hashable
    run: Pass
    given: tuple[Any, ...]
    reads: Slots | None


class GraphedPasses:
    def __init__(
        self,
        run: Pass,
        counters: Counters,
        *,
        budget: int,
        always: bool,
        capture: Capture = CapturedPass,
    ) -> None:
        self._run = run
        self._counters = counters
        self._capture = capture
        self._plan: Plan[Graph] = Plan(budget, always=always)
        self._told: set[str] = set()
        self._eager: _Call | None = None  # the last pass, if it was
        self._due: _Call | None = None

    def slots(self, layout: Layout, device: torch.device) -> Slots | None:
        """Where passes, replayed or not, read adapters of this layout; None if they should not."""
        kept: Slots | None = self._plan.shared(layout)
        if kept is not None:
            return kept
        if not self._plan.takes_adapters(layout.adapters, layout.adapter_bytes, len(layout.layers)):
            return None
        made = Slots(layout, device, self._counters)
        self._counters.add("graph_evictions_total", self._plan.share(layout, made, layout.nbytes))
        self._show()
        return made

    def velocity(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Any,
        expert: int,
        adapted: Adapted | None = None,
    ) -> Tensor:
        """As that of the pipeline; the result is good until the next call."""
        given = latents, timesteps, context, expert
        key: Hashable = signature(given)
        run, reads = self._run, None
        if adapted is not None:
            run, reads = adapted.run, adapted.slots
            key = key, reads.layout, adapted.rows
        graph = self._plan.get(key)
        if graph is not None:
            self._eager = None
            self._counters.add("graph_replays_total")
            return graph.replay(latents, timesteps, context)
        self._eager = _Call(key, run, given, reads)
        if not self._plan.counts(key):
            return run(*given)
        with _CountKernels() as count:
            output = run(*given)
        self._plan.counted(key, count.kernels)
        return output

    def bypass(self, reason: str) -> None:
        """A step of a kind of which no graphs are made."""
        self._eager = None
        self._counters.add("graph_bypasses_total", reason=reason)
        if reason not in self._told:
            self._told.add(reason)
            log.info("%s: such steps run without a graph", BYPASSED[reason])

    def took(self, seconds: float) -> None:
        """The step with the last pass is over."""
        if self._eager is None:
            return
        call, self._eager = self._eager, None
        self._plan.ran(call.key, seconds)
        self._due = call if self._plan.due(call.key) else None

    @torch.inference_mode()
    def make(self) -> None:
        """The graph that is due, if one is. Not while other threads use the device."""
        if self._due is None:
            return
        call, self._due = self._due, None
        layout = None if call.reads is None else call.reads.layout
        if layout is not None and self._plan.shared(layout) is not call.reads:
            return  # they had to make room: nobody writes adapters into them any more
        try:
            graph = self._capture(call.run, *call.given)
        except Exception:
            log.exception("a pass cannot be captured and stays eager")
            self._plan.refuse(call.key)
            self._counters.add("graph_captures_total", result="failed")
            return
        gone = self._plan.put(call.key, graph, graph.size, layout)
        self._counters.add("graph_captures_total", result="made")
        self._counters.add("graph_evictions_total", gone)
        self._show()

    def clear(self) -> None:
        """Let go of all graphs: the memory is needed."""
        self._eager = self._due = None
        self._plan.clear()
        self._show()

    def _show(self) -> None:
        self._counters.set("graphs", len(self._plan))
        self._counters.set("graph_bytes", self._plan.bytes)


class _CountKernels(TorchDispatchMode):
    """Counts calls of ops that are no views: about one kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))
