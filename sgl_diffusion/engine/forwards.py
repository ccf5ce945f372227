"""The forward pass of a batch with all that stands around it: adapters, graphs, the step cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from sgl_diffusion.components.samplers import SolverState
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.contexts import Contexts
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.denoise import next_states
from sgl_diffusion.engine.graphs.capture import Pass
from sgl_diffusion.engine.graphs.passes import Adapted, graphed_passes
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.lineup import Batch
from sgl_diffusion.engine.lora.layout import Layouts
from sgl_diffusion.engine.lora.rows import Blend, RowAdapters
from sgl_diffusion.engine.lora.slots import Slots
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.step_cache import StepCache
from sgl_diffusion.engine.trace import Trace
from sgl_diffusion.engine.transformers import denoisers
from sgl_diffusion.engine.watch import Watch


class Forwards:
    """Of one runner. Rows are not changed here."""

    def __init__(
        self,
        pipeline: Pipeline,
        bounds: Bounds,
        counters: Counters,
        watch: Watch,
        trace: Trace,
        branches: Branches | None,
    ) -> None:
        self._pipeline = pipeline
        self._watch = watch
        self._trace = trace
        self._branches = branches
        self._contexts = Contexts(pipeline, branches, most=bounds.lanes)
        self._step_cache = StepCache(pipeline, counters)
        self.graphs = None if branches else graphed_passes(pipeline, bounds, counters)
        self.adapters = RowAdapters(pipeline.device)
        self._layouts = Layouts(denoisers(pipeline))

    def run(self, batch: Batch) -> list[SolverState]:
        """What the rows come to, in order."""
        key, rows = batch.key, batch.rows
        blends = [row.job.blend for row in rows]
        run, slots = self._graphed(batch, blends)
        reused = self._step_cache.of(rows[0] if key.alone else None)
        with self._around(batch), self.adapters.of(blends, slots), reused:
            context = self._contexts.of(key, rows)
            return next_states(self._pipeline, key, rows, context, self._branches, run)

    def _graphed(
        self, batch: Batch, blends: Sequence[Blend | None]
    ) -> tuple[Pass | None, Slots | None]:
        """The passes of which there may be graphs, and where they read the adapters of rows; unless
        this step is none of them: a graph has every block of a model, and one size."""
        if self.graphs is None:
            return None, None
        reason = ""
        if batch.key.alone:
            reason = "step_cache"
        elif len({row.job.size for row in batch.rows}) > 1:
            reason = "sizes"
        else:
            layout = self._layouts.of(dict.fromkeys(blend for blend in blends if blend is not None))
            if not layout.layers:
                return self.graphs.velocity, None
            slots = self.graphs.slots(layout, self._pipeline.device)
            if slots is not None:
                rows = len(blends)
                run = self.adapters.through(slots, rows, self._pipeline.velocity)
                adapted = Adapted(run, slots, rows)
                return partial(self.graphs.velocity, adapted=adapted), slots
            reason = "adapters"
        self.graphs.bypass(reason)
        return None, None

    def work(self, batch: Batch) -> Callable[[], list[SolverState]]:
        """The same of a plain batch, made ready here, for another thread to do."""
        key, rows = batch.key, batch.rows
        context = self._contexts.of(key, rows)

        def work() -> list[SolverState]:
            with self._around(batch):
                return next_states(self._pipeline, key, rows, context)

        return work

    def keep(self, jobs: Mapping[str, Job]) -> None:
        """Forget what was made ready for batches that are no more."""
        self._contexts.keep(jobs)

    def clear(self) -> None:
        """Forget it of all, and the graphs."""
        self._contexts.keep({})
        if self.graphs is not None:
            self.graphs.clear()
            self.adapters.clear()

    @contextmanager
    def _around(self, batch: Batch) -> Iterator[None]:
        ids = [job.id for job in batch.jobs]
        sizes = ", ".join(dict.fromkeys(job.size for job in batch.jobs))
        span = self._trace.span("denoise", rows=len(batch.rows), jobs=ids, size=sizes)
        with span, self._watch.of(batch.jobs):
            yield
