"""Makes errands of units of work: what to do, and how its result gets into the job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from sgl_diffusion.engine.decoding import Chunk, Part
from sgl_diffusion.engine.encoding import Encoding
from sgl_diffusion.engine.errand import Errand
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.lineup import Decode, Encode
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.prompts import PromptCache
from sgl_diffusion.engine.tiles import Tiles
from sgl_diffusion.orchestrator.stage import Outbox


class Errands:
    """`decoded` is called with a job when its last row is; `tiles` decode, where there are any."""

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: PromptCache,
        outbox: Outbox,
        decoded: Callable[[Job], None],
        tiles: Tiles | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._encoding = Encoding(pipeline, prompts)
        self._outbox = outbox
        self._decoded = decoded
        self._tiles = tiles

    def of(self, unit: Encode | Decode) -> Errand:
        return self._encode(unit.job) if isinstance(unit, Encode) else self._decode(unit.job)

    def _encode(self, job: Job) -> Errand:
        self._outbox.progress(job.id, 0, job.steps, "encode")
        return Errand(
            "encode",
            job,
            work=lambda _: self._encoding.encode(job),
            take=lambda encoded: encoded.give(job),
            undo=lambda: None,
        )

    def _decode(self, job: Job) -> Errand:
        part = Part.of(job)
        work = partial(part.decode, self._frames)
        return Errand("decode", job, work, partial(self._take, part), part.undo)

    def _frames(self, latents: Tensor, row: Row) -> Iterator[Tensor]:
        if self._tiles is None:
            return self._pipeline.decode(latents)
        return self._tiles.decode(latents, row.job.params.height)

    def _take(self, part: Part, chunks: list[Chunk]) -> None:
        job = part.rows[0].job
        if part.preview is not None:
            frames = [frames for _, frames in chunks]
            self._outbox.output(job.id, part.meta(part.preview), frames, final=False)
            return
        part.take(chunks)
        self._outbox.progress(job.id, job.step, job.steps, "decode")
        if all(row.decoded for row in job.rows):
            self._decoded(job)
