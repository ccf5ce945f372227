"""The collated conditions of each batch, put together once while its rows stay together."""

from __future__ import annotations

from collections.abc import Mapping

from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.job import Row
from sgl_diffusion.engine.lineup import Batch
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Context, Pipeline

_Rows = tuple[ShapeKey, tuple[Row, ...]]


class Contexts:
    def __init__(self, pipeline: Pipeline, branches: Branches | None = None) -> None:
        self._pipeline = pipeline
        self._branches = branches or Branches()
        self._known: dict[_Rows, Context] = {}

    def of(self, key: ShapeKey, rows: list[Row]) -> Context:
        known = self._known.get((key, tuple(rows)))
        if known is not None:
            return known
        conditions = [row.job.condition for row in rows]
        if key.guided:
            negatives = [row.job.negative for row in rows]
            conditions = self._branches.conditions(conditions, negatives)
        context = self._pipeline.collate(conditions)
        self._known[key, tuple(rows)] = context
        return context

    def keep(self, batches: Mapping[Batch, list[Row]]) -> None:
        """Forget what belongs to none of these batches."""
        wanted = {(batch.key, tuple(rows)) for batch, rows in batches.items()}
        for known in self._known.keys() - wanted:
            del self._known[known]
