"""Files that come with a request: an upload, a data URL, a URL, or an allowed local path."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.datastructures import UploadFile

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.fetch import Fetcher
from sgl_diffusion.server.pictures import MAX_PIXELS, decode_picture

if TYPE_CHECKING:
    from PIL.Image import Image

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]*)*)(;base64)?,", re.ASCII)
_PICTURE_TYPES = frozenset({"image/png", "image/jpeg", "image/jpg", "image/webp"})
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, kw_only=True)
class InputRules:
    """What a client may send as a file, and how large."""

    image_bytes: int = 50 * 2**20
    image_pixels: int = MAX_PIXELS
    image_count: int = 16
    local_roots: tuple[Path, ...] = ()


class Inputs:
    """Reads the files of requests; at most two pictures are decoded at a time."""

    def __init__(self, rules: InputRules, fetcher: Fetcher, threads: ThreadPoolExecutor) -> None:
        self.rules = rules
        self.fetcher = fetcher
        self._threads = threads
        self._decoding = asyncio.Semaphore(2)

    async def picture(self, source: Any, *, param: str) -> Image:
        """The picture behind `source`: upright RGB or RGBA without metadata."""
        data = await self.read(
            source, param=param, types=_PICTURE_TYPES, max_bytes=self.rules.image_bytes
        )
        work = partial(decode_picture, data, param=param, max_pixels=self.rules.image_pixels)
        async with self._decoding:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def read(
        self, source: Any, *, param: str, types: frozenset[str], max_bytes: int
    ) -> bytes:
        """The bytes behind an UploadFile or a text; `types` are those a data URL may declare."""
        if isinstance(source, UploadFile):
            return await _read_upload(source, param, max_bytes)
        if not isinstance(source, str):
            raise RequestError("A file or a URL is wanted.", code="file_expected", param=param)
        if source[:5].lower() == "data:":
            return await self._in_thread(partial(read_data_url, source, param, types, max_bytes))
        local = source.startswith("/") and not source.startswith("//")
        if source[:5].lower() == "file:":
            local, source = True, _path_of(source)
        if local:
            return await self._in_thread(
                partial(_read_local, source, self.rules.local_roots, param, max_bytes)
            )
        if not _SCHEME.match(source):
            raise RequestError(
                "This is neither a file, nor a data URL, nor an http or https URL.",
                code="unsupported_url_scheme",
                param=param,
            )
        return await self.fetcher.fetch(source, max_bytes=max_bytes, param=param)

    async def _in_thread(self, work: partial[bytes]) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def _read_upload(upload: UploadFile, param: str, max_bytes: int) -> bytes:
    data = await upload.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_large(max_bytes, param)
    if not data:
        raise RequestError("The file is empty.", code="file_expected", param=param)
    return data


def read_data_url(text: str, param: str, types: frozenset[str], max_bytes: int) -> bytes:
    """The bytes of a base64 data URL that declares one of `types`."""
    comma = text.find(",", 0, 1024)
    head = _DATA_URL.fullmatch(text[: comma + 1].lower())
    if head is None or head[3] is None or head[1] not in types:
        raise _bad_data_url(
            f"A data URL must be base64 and one of {', '.join(sorted(types))}.", param
        )
    if (len(text) - comma) * 3 // 4 > max_bytes + 4:
        raise too_large(max_bytes, param)
    try:
        data = base64.b64decode(text[comma + 1 :], validate=True)
    except (binascii.Error, ValueError):
        raise _bad_data_url("The data URL is not valid base64.", param) from None
    if len(data) > max_bytes:
        raise too_large(max_bytes, param)
    if not data:
        raise _bad_data_url("The data URL is empty.", param)
    return data


def _path_of(url: str) -> str:
    """The path behind a file URL; empty where it is none of this machine."""
    try:
        parts = urlsplit(url)
        path = os.fsdecode(unquote_to_bytes(parts.path))
    except ValueError:
        return ""
    here = parts.netloc.lower() in ("", "localhost")
    return path if here and not parts.query and not parts.fragment else ""


def _read_local(path: str, roots: tuple[Path, ...], param: str, max_bytes: int) -> bytes:
    """A regular file under one of `roots`; links, also on the way to it, lead nowhere else."""
    refused = RequestError(
        "This server does not read that path.",
        hint="The operator can allow a folder with --allowed-media-path.",
        code="local_path_not_allowed",
        param=param,
    )
    if "\0" in path or not path.startswith("/"):
        raise refused
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        raise refused
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        raise refused from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise refused
    with open(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise too_large(max_bytes, param)
        return file.read(max_bytes)


def too_large(max_bytes: int, param: str) -> RequestError:
    return RequestError(
        f"The file is larger than {max_bytes // 2**20} MB.", code="file_too_large", param=param
    )


def _bad_data_url(what: str, param: str) -> RequestError:
    return RequestError(what, code="invalid_data_url", param=param)
