"""From a finished image job to its answer: files, rows, bodies and events.

What takes time (PNG, the disk, a long answer) happens in threads. `b64_json` of an entry holds the
bytes of a file: base64 comes into being within the JSON, once and in no text of its own.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.orchestrator.jobstore import JobRow
from sgl_diffusion.server.context import ServerContext
from sgl_diffusion.server.files import write_file
from sgl_diffusion.server.media import encode_image
from sgl_diffusion.server.metadata import settings_text
from sgl_diffusion.server.schemas import ImageRequest

if TYPE_CHECKING:
    from sgl_diffusion.client.types import Generation
    from sgl_diffusion.server.media import Array
    from sgl_diffusion.server.repeats import Origin

KIND = "image"
_UPLOAD_SECONDS = 10.0  # an answer waits so long for the address in the bucket
_SMALL = 2**20
_ECHOED = ("low", "medium", "high", "xhigh", "max")  # what the OpenAI SDK can read back


@dataclass(frozen=True)
class ImageJob:
    """One request on its way; `event` is the first word of its events' names."""

    context: ServerContext
    id: str
    wanted: ImageRequest
    params: ResolvedParams
    model: str
    event: str
    origin: Origin
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def kind(self) -> str:
        """What the metrics call it: image or edit."""
        return "edit" if self.event == "image_edit" else KIND

    async def respond(self, body: dict[str, Any]) -> Response:
        write = partial(msgspec.json.encode, body)
        size = sum(len(entry["b64_json"] or b"") for entry in body["data"])
        # A thread and back takes longer than half a millisecond's work.
        data = write() if size <= _SMALL else await self.context.in_thread(write)
        return Response(data, media_type="application/json")

    async def body(self, generation: Generation) -> dict[str, Any]:
        """The answer to a request that waits."""
        entries = await self.finish(generation)
        return self._body(entries, generation.seconds, generation.peak_memory_mb)

    async def earlier(self) -> dict[str, Any] | None:
        """The answer that the same request got before; None if there is none, or no more."""
        if not self.origin.repeatable:
            return None
        context, probe = self.context, self._row([], {}, 0.0)
        row = await context.jobs.earlier(probe, retried=self.origin.retried)
        if row is None:
            return None
        if not context.files.has(row.files):  # it would be the answer to the same request for ever
            await context.jobs.expire(row.id, "file gone")
            return None
        paths = [context.files.folder(KIND) / file["name"] for file in row.files]
        try:
            encoded = await context.in_thread(lambda: [path.read_bytes() for path in paths])
        except FileNotFoundError:  # it is in the bucket only
            return None
        former = replace(self, id=row.id, created=int(row.created_at), model=row.payload["model"])
        entries, payload = former._entries(encoded, row), row.payload
        return former._body(entries, payload["seconds"], payload.get("peak_memory_mb", 0.0))

    async def finish(self, generation: Generation) -> list[dict[str, Any]]:
        """One entry per image. Those that get a URL are on disk, and in the job table, by then."""
        encoded = await asyncio.gather(
            *(
                self.context.in_thread(partial(self._encode, index, clip[0]))
                for index, clip in enumerate(generation.clips)
            )
        )
        row = None
        if self.wanted.response_format != "b64_json" or self.origin.key is not None:
            row = await self._keep(encoded, generation)
        return self._entries(encoded, row)

    def _entries(self, encoded: list[bytes], row: JobRow | None) -> list[dict[str, Any]]:
        wanted = self.wanted
        shown = row if wanted.response_format != "b64_json" else None
        by_url = wanted.response_format == "url" and not wanted.stream
        return [
            {
                "b64_json": None if by_url else data,
                "url": None if shown is None else image_url(self.context, shown, index),
                "revised_prompt": None,
            }
            for index, data in enumerate(encoded)
        ]

    async def partial(self, index: int, row: int, picture: Array) -> dict[str, Any]:
        """The event of a picture that is under way."""
        encode = partial(
            encode_image, picture, self.wanted.output_format, self.wanted.file_quality()
        )
        return self._event("partial_image") | {
            "b64_json": await self.context.in_thread(encode),
            "partial_image_index": index,
            "image_index": row,
        }

    def completed(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The event of a finished picture."""
        more = {"image_index": index, "id": self.id, "seed": self.params.seeds[index]}
        return self._event("completed") | entry | more | {"usage": usage(1)}

    def _event(self, name: str) -> dict[str, Any]:
        quality = self.wanted.quality if self.wanted.quality in _ECHOED else "auto"
        about = {"type": f"{self.event}.{name}", "created_at": self.created, "quality": quality}
        return about | self._about()

    def _body(
        self, entries: list[dict[str, Any]], seconds: dict[str, float], peak_memory_mb: float
    ) -> dict[str, Any]:
        body = self._about() | {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "data": entries,
            "seeds": list(self.params.seeds),
            "inference_time_s": round(sum(seconds.values()), 3),
            "peak_memory_mb": peak_memory_mb,
            "usage": usage(len(entries)),
        }
        if self.wanted.quality in _ECHOED:
            body["quality"] = self.wanted.quality
        return body

    def _about(self) -> dict[str, Any]:
        return {
            "background": "opaque",
            "output_format": self.wanted.output_format,
            "size": f"{self.params.width}x{self.params.height}",
        }

    def _encode(self, index: int, picture: Array) -> bytes:
        settings = None
        if self.context.settings.metadata:
            settings = settings_text(self.params, self.model, index)
        with self.context.record.span("file", job=self.id):
            return encode_image(
                picture, self.wanted.output_format, self.wanted.file_quality(), settings
            )

    async def _keep(self, encoded: list[bytes], generation: Generation) -> JobRow:
        """Write the files, then the row that makes them known."""
        kind, files = self.wanted.output_format, self.context.files
        paths = [files.image(self.id, index, kind) for index in range(len(encoded))]

        def write() -> None:
            for path, data in zip(paths, encoded, strict=True):
                write_file(path, partial(_put, data))

        entries = [
            {"name": path.name, "index": index, "bytes": len(data)}
            for index, (path, data) in enumerate(zip(paths, encoded, strict=True))
        ]
        row = None
        try:
            await self.context.in_thread(write)
            row = await self.context.jobs.insert(
                self._row(entries, generation.seconds, generation.peak_memory_mb)
            )
        finally:
            if row is None or row.id != self.id:  # the same request was quicker
                for path in paths:
                    path.unlink(missing_ok=True)
        if self.context.uploads is not None:
            await self.context.uploads.settled(row.id, _UPLOAD_SECONDS)
            row = await self.context.jobs.get(row.id) or row
        return row

    def _row(
        self, files: list[dict[str, Any]], seconds: dict[str, float], peak_memory_mb: float
    ) -> JobRow:
        payload = {"model": self.model, "output_format": self.wanted.output_format}
        return JobRow(
            id=self.id,
            kind=KIND,
            status="completed",
            progress=100,
            attempts=1,
            payload={
                **payload,
                "params": asdict(self.params),
                "seconds": seconds,
                "peak_memory_mb": peak_memory_mb,
            },
            completed_at=time.time(),
            created_at=self.created,
            expires_at=self.context.keeper.expires_at(),
            files=files,
            model=self.context.card().path,
            seeds=list(self.params.seeds),
            adapters=[asdict(use) for use in self.params.loras]
            or self.context.client.loras.active(),
            owner=self.origin.owner,
            idempotency_key=self.origin.key,
            body_hash=self.origin.body_hash,
        )


def image_url(context: ServerContext, row: JobRow, index: int) -> str:
    """Where an image can be had: in the bucket if it is there, else here."""
    remote = context.remote_url(row.files[index])
    if remote is not None:
        return remote
    base = (context.settings.public_base_url or "").rstrip("/")
    variant = f"?variant={index}" if len(row.files) > 1 else ""
    return f"{base}/v1/images/{row.id}/content{variant}"


def usage(images: int) -> dict[str, Any]:
    """In the words of OpenAI and of SGLang, whose types want it: tokens are not counted, and nobody
    is charged."""
    return {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 0,
        "prompt_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": 0,
        "reasoning_tokens": 0,
        "image_count": images,
    }


def _put(encoded: bytes, path: Path) -> None:
    path.write_bytes(encoded)
