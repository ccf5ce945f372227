"""From latents to frames: the next chunks of a job, or what a step of a row foresaw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sgl_diffusion.engine.errand import GoOn
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.previews import Preview

Decode = Callable[[Tensor, Row], Iterator[Tensor]]  # latents of a row to its frames, by chunks
Chunk = tuple[Row, Tensor | None]  # finished uint8 frames [f, H, W, 3] on the host; or the row ends


@dataclass(frozen=True)
class Part:
    """What is to be decoded next of a job: a preview of the first of these rows, or the rows."""

    rows: tuple[Row, ...]
    preview: Preview | None

    @classmethod
    def of(cls, job: Job) -> Part:
        rows = tuple(row for row in job.rows if row.to_decode)
        for row in rows:
            if row.previews:
                return cls((row,), row.previews.popleft())
        return cls(rows, None)

    @torch.inference_mode()
    def decode(self, decode: Decode, go_on: GoOn) -> list[Chunk]:
        """A preview; or one chunk, and more as long as it may go on."""
        if self.preview is not None:
            (shown,) = decode(self.preview.latents, self.rows[0])
            return [(self.rows[0], _finished(self.rows[0], shown))]
        chunks: list[Chunk] = []
        for row in self.rows:
            while True:
                frames = _next(decode, row)
                chunks.append((row, frames))
                if frames is None:
                    break
                if not go_on():
                    return chunks
        return chunks

    def meta(self, preview: Preview) -> dict[str, int]:
        """What is told with its frames."""
        row = self.rows[0]
        return {"partial": preview.index, "row": row.job.rows.index(row), "step": preview.step}

    def take(self, chunks: list[Chunk]) -> None:
        """Note chunks of the rows."""
        for row, frames in chunks:
            if frames is not None:
                row.frames.append(frames)
            else:
                row.decoded, row.chunks, row.state, row.noise = True, None, None, None

    def undo(self) -> None:
        """As if nothing of it had been decoded."""
        if self.preview is not None:
            self.rows[0].previews.appendleft(self.preview)
            return
        for row in self.rows:
            row.chunks = None
            row.frames.clear()


def _next(decode: Decode, row: Row) -> Tensor | None:
    if row.chunks is None:
        assert row.state is not None
        row.chunks = decode(row.state.x, row)
    chunk = next(row.chunks, None)
    return None if chunk is None else _finished(row, chunk)


def _finished(row: Row, frames: Tensor) -> Tensor:
    frames, origin = frames.cpu(), row.job.origin
    return frames if origin is None else origin.finish(frames)
