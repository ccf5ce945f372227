"""From latents to frames: the next chunk of a row that is done, or what a step of it foresaw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.previews import Preview


@dataclass(frozen=True)
class Part:
    """What is to be decoded next of a job: a preview of a row, or a chunk of the row itself."""

    row: Row
    preview: Preview | None

    @classmethod
    def of(cls, job: Job) -> Part:
        row = next(row for row in job.rows if row.to_decode)
        return cls(row, row.previews.popleft() if row.previews else None)

    @torch.inference_mode()
    def decode(self, pipeline: Pipeline) -> Tensor | None:
        """Finished uint8 frames [f, H, W, 3] on the host; None behind the last chunk."""
        if self.preview is not None:
            (frames,) = pipeline.decode(self.preview.latents)
            return self._finished(frames)
        row = self.row
        if row.chunks is None:
            assert row.state is not None
            row.chunks = pipeline.decode(row.state.x)
        chunk = next(row.chunks, None)
        return None if chunk is None else self._finished(chunk)

    def meta(self, preview: Preview) -> dict[str, int]:
        """What is told with its frames."""
        rows = self.row.job.rows
        return {"partial": preview.index, "row": rows.index(self.row), "step": preview.step}

    def take(self, frames: Tensor | None) -> None:
        """Note a chunk."""
        row = self.row
        if frames is not None:
            row.frames.append(frames)
        else:
            row.decoded, row.chunks, row.state, row.noise = True, None, None, None

    def _finished(self, frames: Tensor) -> Tensor:
        frames, origin = frames.cpu(), self.row.job.origin
        return frames if origin is None else origin.finish(frames)
