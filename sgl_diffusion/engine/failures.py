"""What a failure in the engine means for the user."""

from __future__ import annotations

import torch

from sgl_diffusion.base.errors import EngineError, OutOfMemoryError, SglError
from sgl_diffusion.engine.job import Job


def explain(error: Exception, job: Job) -> SglError:
    """What a user may read of an error: ours as it is, nothing of a foreign text."""
    if isinstance(error, SglError):
        return error
    if is_out_of_memory(error):
        params = job.params
        return OutOfMemoryError(
            f"The device ran out of memory at step {job.step} of {job.steps} "
            f"({params.width}x{params.height}, {params.num_frames} frames).",
            hint="Ask for a smaller size, fewer frames or fewer outputs.",
        )
    return EngineError(
        f"The engine met an internal error ({type(error).__name__}).",
        hint="The worker's log holds the traceback.",
    )


def numbers_broken() -> EngineError:
    """Of a row whose latents are not finite."""
    return EngineError(
        "The model computed no finite numbers for this picture.",
        hint="Its weights or an adapter are damaged, or too large for their precision: try "
        "--dit-precision fp32, or the adapter with less strength.",
        code="numbers_broken",
    )


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for GPUs only; its CPU allocator raises a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )
