"""What the client gives back: generations, their handles, and the types they are made of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.base.errors import EngineError
from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.orchestrator.job import Event, JobHandle, JobOutput, Snapshot
from sgl_diffusion.orchestrator.limits import Health, Limits

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Event",
    "Generation",
    "GenerationHandle",
    "Health",
    "Limits",
    "Partial",
    "Snapshot",
    "partial_of",
]


@dataclass(frozen=True)
class Generation:
    """The outcome of one job. `clips` holds one uint8 [frames, height, width, 3] per seed;
    `reused_steps` counts those of all clips that did not run whole, as `enable_teacache` lets them.
    """

    job_id: str
    params: ResolvedParams
    clips: list[NDArray[np.uint8]]
    seconds: dict[str, float] = field(default_factory=dict)
    attempt: int = 1
    reused_steps: int = 0
    peak_memory_mb: float = 0.0  # the most that the worker took meanwhile; 0: it did not tell

    @property
    def frames(self) -> NDArray[np.uint8]:
        """The frames of the first clip."""
        return self.clips[0]

    def images(self) -> list[Image]:
        """Every frame of every clip as a Pillow image: one per seed, where pictures were asked."""
        from PIL import Image

        return [Image.fromarray(frame) for clip in self.clips for frame in clip]


@dataclass(frozen=True)
class Partial:
    """A picture under way, uint8 [height, width, 3]: what `step` of output `row` foresees; `index`
    counts the partial pictures of that output."""

    index: int
    row: int
    step: int
    picture: NDArray[np.uint8]


def partial_of(event: Event) -> Partial | None:
    """The partial picture that an event brings, if it brings one."""
    if event.kind != "output" or event.output is None:
        return None
    meta = event.output.meta
    clip = event.output.arrays[0]
    return Partial(int(meta["partial"]), int(meta["row"]), int(meta["step"]), clip[0])


class GenerationHandle:
    """A submitted generation; dropping the handle lets it run on and forgets the result."""

    def __init__(self, job: JobHandle, params: ResolvedParams) -> None:
        self._job = job
        self.params = params

    @property
    def id(self) -> str:
        return self._job.id

    def snapshot(self) -> Snapshot:
        """State, progress and place in the queue at this moment."""
        return self._job.snapshot()

    def events(self) -> AsyncIterator[Event]:
        """Events from now on: the present state first, "done" or "failed" last."""
        return self._job.events()

    async def result(self) -> Generation:
        """Wait for the outcome; raises the job's SglError. Giving up the wait cancels nothing."""
        output = await self._job.result()
        return Generation(
            job_id=self.id,
            params=self.params,
            clips=_clips(output, self.params),
            seconds={str(k): float(v) for k, v in output.meta.get("seconds", {}).items()},
            reused_steps=int(output.meta.get("reused_steps", 0)),
            peak_memory_mb=round(output.meta.get("peak_memory", 0) / 2**20, 1),
            attempt=self._job.snapshot().attempt,
        )

    def cancel(self) -> bool:
        """End the job now with CancelledError; False if it had ended before."""
        return self._job.cancel()


def _clips(output: JobOutput, params: ResolvedParams) -> list[NDArray[np.uint8]]:
    fit = all(
        clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[3] == 3 for clip in output.arrays
    )
    if not fit or len(output.arrays) != len(params.seeds):
        shapes = ", ".join(f"{clip.dtype} {list(clip.shape)}" for clip in output.arrays)
        raise EngineError(
            f"The worker answered {shapes or 'nothing'} for {len(params.seeds)} outputs.",
            hint="Server and worker are of different versions; reinstall the package.",
        )
    return list(output.arrays)
