"""The collated conditions of each batch, put together once while its rows stay together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Context, Pipeline


class Contexts:
    def __init__(self, pipeline: Pipeline, branches: Branches | None = None) -> None:
        self._pipeline = pipeline
        self._branches = branches or Branches()
        self._known: dict[ShapeKey, tuple[tuple[Row, ...], Context]] = {}

    @torch.inference_mode()
    def of(self, key: ShapeKey, rows: tuple[Row, ...]) -> Context:
        known = self._known.get(key)
        if known is not None and known[0] == rows:
            return known[1]
        conditions = [row.job.condition for row in rows]
        if key.guided:
            negatives = [row.job.negative for row in rows]
            conditions = self._branches.conditions(conditions, negatives)
        context = self._pipeline.collate(conditions)
        self._known[key] = rows, context
        return context

    def keep(self, jobs: Mapping[str, Job]) -> None:
        """Forget the batches that have lost a row: it is done, or its job is not among these."""
        for key, (rows, _) in list(self._known.items()):
            if any(row.denoised or jobs.get(row.job.id) is not row.job for row in rows):
                del self._known[key]
