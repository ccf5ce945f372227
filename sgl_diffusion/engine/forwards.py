"""The forward pass of a batch with all that stands around it: adapters, graphs, the step cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from sgl_diffusion.components.samplers import SolverState
from sgl_diffusion.engine.bounds import Bounds
from sgl_diffusion.engine.contexts import Contexts
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.denoise import next_states
from sgl_diffusion.engine.graphs.capture import Pass
from sgl_diffusion.engine.graphs.passes import graphed_passes
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.lineup import Batch
from sgl_diffusion.engine.lora.rows import RowAdapters
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.step_cache import StepCache
from sgl_diffusion.engine.trace import Trace
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

    def run(self, batch: Batch) -> list[SolverState]:
        """What the rows come to, in order."""
        key, rows = batch.key, batch.rows
        blends = [row.job.blend for row in rows]
        run = self._graphed(batch)
        reused = self._step_cache.of(rows[0] if key.alone else None)
        with self._around(batch), self.adapters.of(blends), reused:
            context = self._contexts.of(key, rows)
            return next_states(self._pipeline, key, rows, context, self._branches, run)

    def _graphed(self, batch: Batch) -> Pass | None:
        """The passes of which there may be graphs, unless this step is none of them: a graph has
        the weights as they are, every block of them, and one size."""
        if self.graphs is None:
            return None
        reason = ""
        if any(row.job.blend is not None for row in batch.rows):
            reason = "adapters"
        elif batch.key.alone:
            reason = "step_cache"
        elif len({row.job.size for row in batch.rows}) > 1:
            reason = "sizes"
        if not reason:
            return self.graphs.velocity
        self.graphs.bypass(reason)
        return None

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

    @contextmanager
    def _around(self, batch: Batch) -> Iterator[None]:
        ids = [job.id for job in batch.jobs]
        sizes = ", ".join(dict.fromkeys(job.size for job in batch.jobs))
        span = self._trace.span("denoise", rows=len(batch.rows), jobs=ids, size=sizes)
        with span, self._watch.of(batch.jobs):
            yield
