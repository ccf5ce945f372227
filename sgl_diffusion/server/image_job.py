"""From a finished image job to its answer: files, rows, bodies and events.

Everything that takes time (PNG, base64, JSON, the disk) happens in threads.
"""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import asdict, dataclass, field
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

KIND = "image"
_UPLOAD_SECONDS = 10.0  # an answer waits so long for the address in the bucket
_ECHOED = ("low", "medium", "high", "xhigh", "max")  # what the OpenAI SDK can read back
# The SDK's types want it in the last event; nothing is counted, and nobody is charged.
_NO_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


@dataclass(frozen=True)
class ImageJob:
    """One request on its way; `event` is the first word of its events' names."""

    context: ServerContext
    id: str
    wanted: ImageRequest
    params: ResolvedParams
    model: str
    event: str
    owner: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    async def respond(self, generation: Generation) -> Response:
        """The answer to a request that waits."""
        entries = await self.finish(generation)
        body = self._about() | {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "data": entries,
            "seeds": list(self.params.seeds),
            "inference_time_s": round(sum(generation.seconds.values()), 3),
        }
        if self.wanted.quality in _ECHOED:
            body["quality"] = self.wanted.quality
        data = await self.context.in_thread(partial(msgspec.json.encode, body))
        return Response(data, media_type="application/json")

    async def finish(self, generation: Generation) -> list[dict[str, Any]]:
        """One entry per image. Those that get a URL are on disk, and in the job table, by then."""
        encoded = await asyncio.gather(
            *(
                self.context.in_thread(partial(self._encode, index, clip[0]))
                for index, clip in enumerate(generation.clips)
            )
        )
        urls: list[str | None] = [None] * len(encoded)
        if self.wanted.response_format != "b64_json":
            urls = await self._keep([data for data, _ in encoded])
        return [
            {"b64_json": text, "url": url, "revised_prompt": None}
            for (_, text), url in zip(encoded, urls, strict=True)
        ]

    async def partial(self, index: int, row: int, picture: Array) -> dict[str, Any]:
        """The event of a picture that is under way."""
        kind, quality = self.wanted.output_format, self.wanted.file_quality()

        def encode() -> str:
            return base64.b64encode(encode_image(picture, kind, quality)).decode()

        return self._event("partial_image") | {
            "b64_json": await self.context.in_thread(encode),
            "partial_image_index": index,
            "image_index": row,
        }

    def completed(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        """The event of a finished picture."""
        more = {"image_index": index, "id": self.id, "seed": self.params.seeds[index]}
        return self._event("completed") | entry | more | {"usage": _NO_USAGE}

    def _event(self, name: str) -> dict[str, Any]:
        quality = self.wanted.quality if self.wanted.quality in _ECHOED else "auto"
        about = {"type": f"{self.event}.{name}", "created_at": self.created, "quality": quality}
        return about | self._about()

    def _about(self) -> dict[str, Any]:
        return {
            "background": "opaque",
            "output_format": self.wanted.output_format,
            "size": f"{self.params.width}x{self.params.height}",
        }

    def _encode(self, index: int, picture: Array) -> tuple[bytes, str | None]:
        """The file, and its text where the answer holds it: together, a thread is a long way."""
        settings = None
        if self.context.settings.metadata:
            settings = settings_text(self.params, self.model, index)
        data = encode_image(
            picture, self.wanted.output_format, self.wanted.file_quality(), settings
        )
        shown = self.wanted.response_format != "url" or self.wanted.stream
        return data, base64.b64encode(data).decode() if shown else None

    async def _keep(self, encoded: list[bytes]) -> list[str | None]:
        """Write the files, then the row that makes them known; returns where each can be had."""
        kind, files = self.wanted.output_format, self.context.files
        paths = [files.image(self.id, index, kind) for index in range(len(encoded))]

        def write() -> None:
            for path, data in zip(paths, encoded, strict=True):
                write_file(path, partial(_put, data))

        row = JobRow(
            id=self.id,
            kind=KIND,
            status="completed",
            progress=100,
            payload={"params": asdict(self.params), "model": self.model, "output_format": kind},
            completed_at=time.time(),
            created_at=self.created,
            files=[
                {"name": path.name, "index": index, "bytes": len(data)}
                for index, (path, data) in enumerate(zip(paths, encoded, strict=True))
            ],
            model=self.model,
            seeds=list(self.params.seeds),
            adapters=[asdict(use) for use in self.params.loras],
            owner=self.owner,
        )
        try:
            await self.context.in_thread(write)
            await self.context.runner.jobs.insert(row)
        except BaseException:
            for path in paths:
                path.unlink(missing_ok=True)
            raise
        if self.context.uploads is not None:
            await self.context.uploads.settled(self.id, _UPLOAD_SECONDS)
            row = await self.context.runner.jobs.get(self.id) or row
        return [image_url(self.context, row, index) for index in range(len(paths))]


def image_url(context: ServerContext, row: JobRow, index: int) -> str:
    """Where an image can be had: in the bucket if it is there, else here."""
    remote = context.remote_url(row.files[index])
    if remote is not None:
        return remote
    base = (context.settings.public_base_url or "").rstrip("/")
    variant = f"?variant={index}" if len(row.files) > 1 else ""
    return f"{base}/v1/images/{row.id}/content{variant}"


def _put(encoded: bytes, path: Path) -> None:
    path.write_bytes(encoded)
