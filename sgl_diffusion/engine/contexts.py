"""The collated conditions of batches, put together once while their rows stay together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sgl_diffusion.engine.denoise import ShapeKey
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.parallel.branches import Branches
from sgl_diffusion.engine.pipeline import Context, Pipeline


class Contexts:
    """Of each key the latest `most`."""

    def __init__(self, pipeline: Pipeline, branches: Branches | None = None, most: int = 1) -> None:
        self._pipeline = pipeline
        self._branches = branches or Branches()
        self._most = most
        self._known: dict[ShapeKey, dict[tuple[Row, ...], Context]] = {}

    @torch.inference_mode()
    def of(self, key: ShapeKey, rows: tuple[Row, ...]) -> Context:
        known = self._known.setdefault(key, {})
        if rows in known:
            known[rows] = known.pop(rows)  # the latest
            return known[rows]
        conditions = [row.job.condition for row in rows]
        if key.guided:
            negatives = [row.job.negative for row in rows]
            conditions = self._branches.conditions(conditions, negatives)
        context = self._pipeline.collate(conditions)
        known[rows] = context
        if len(known) > self._most:
            del known[next(iter(known))]
        return context

    def keep(self, jobs: Mapping[str, Job]) -> None:
        """Forget the batches that have lost a row: it is done, or its job is not among these."""
        for key, known in list(self._known.items()):
            for rows in list(known):
                if any(row.denoised or jobs.get(row.job.id) is not row.job for row in rows):
                    del known[rows]
            if not known:
                del self._known[key]
