"""Which jobs share forward passes with jobs of other sizes: the one rule, and what it counts in."""

from __future__ import annotations

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.pipeline import PacksSizes, Pipeline

_PIXELS = 256  # of one token, in most families


def packs(pipeline: Pipeline, job: Job) -> bool:
    """Whether rows of this job can stand in one sequence with rows of other sizes.

    A clip's steps are long, and whoever shared one would wait for it. A row that may reuse its
    steps shares none. Adapters of single jobs are applied to rows of a batch, not to tokens, and
    reference pictures would be tokens of one row that others do not have.
    """
    params = job.params
    return (
        isinstance(pipeline, PacksSizes)
        and params.num_frames == 1
        and not params.enable_teacache
        and job.blend is None
        and not (params.images and pipeline.card.edits == "native")
    )


def tokens(params: ResolvedParams) -> int:
    """About how many tokens a row has; what counts is how they compare between sizes."""
    return max(params.width * params.height // _PIXELS, 1)
