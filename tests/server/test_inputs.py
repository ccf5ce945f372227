"""Where a picture may come from: uploads, data URLs, URLs, allowed folders."""

from __future__ import annotations

import asyncio
import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from starlette.datastructures import UploadFile

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.fetch import Fetcher, FetchRules
from sgl_diffusion.server.inputs import InputRules, Inputs


def read(source, **rules):
    """The size of the picture behind `source`, or the code of the refusal."""

    async def inside():
        with ThreadPoolExecutor(1) as threads:
            fetcher = Fetcher(FetchRules(), lambda host, port: ["10.0.0.1"])
            inputs = Inputs(InputRules(**rules), fetcher, threads)
            try:
                return (await inputs.picture(source, param="image")).size
            finally:
                fetcher.close()

    try:
        return asyncio.run(inside())
    except RequestError as error:
        assert error.param == "image"
        return error.code


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (1, 2, 3)).save(buffer, format="png")
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    "name", ["../../etc/cron.d/x", "..\\..\\x", "C:\\x", "a\0b", "x" * 5_000, "a\r\nb", ""]
)
def test_uploads_whatever_they_are_called(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(UploadFile(io.BytesIO(picture()), filename=name)) == (6, 4)
    assert not os.listdir(tmp_path)


def test_uploads_are_bounded():
    assert read(UploadFile(io.BytesIO(picture())), image_bytes=20) == "file_too_large"
    assert read(UploadFile(io.BytesIO(b""))) == "file_expected"


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/PNG", "image/webp", "image/png;name=x.png"])
def test_data_urls(kind):
    assert read(data_url(picture(), kind)) == (6, 4)


@pytest.mark.parametrize(
    "url",
    ["data:", "data:,x", "data:image/png,abc", "data:text/html;base64,AAAA", "data:;base64,AAAA",
     "data:video/jpeg;base64,AAAA", "data:image/svg+xml;base64,AAAA", "data:image/png;base64,",
     "data:image/png;base64,A", "data:image/png;base64,AA AA", "data:image/png;base64,%41%41",
     "data:image/png;base64,ü", "data:image/png;base64" + "x" * 5_000],
)  # fmt: skip
def test_bad_data_urls(url):
    assert read(url) == "invalid_data_url"


def test_a_large_data_url_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("base64.b64decode", lambda *_, **__: pytest.fail("decoded"))
    assert read("data:image/png;base64," + "A" * 4_000, image_bytes=2_000) == "file_too_large"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("picture.png", "unsupported_url_scheme"),
        ("../picture.png", "unsupported_url_scheme"),
        ("//host/x", "unsupported_url_scheme"),
        ("file:///etc/passwd", "local_path_not_allowed"),
        ("FILE://localhost/etc/passwd", "local_path_not_allowed"),
        ("file://[", "local_path_not_allowed"),
        ("", "unsupported_url_scheme"),
        ("/etc/passwd", "local_path_not_allowed"),
        ("http://private.test/", "url_not_allowed"),
        (5, "file_expected"),
        ({"x": 1}, "file_expected"),
        (None, "file_expected"),
    ],
)
def test_other_sources(source, code):
    assert read(source) == code


def test_allowed_folders(tmp_path: Path):
    inside, outside = tmp_path / "media", tmp_path / "media-private"
    inside.mkdir(), outside.mkdir()
    for folder in (inside, outside):
        (folder / "a.png").write_bytes(picture())
    (inside / "link.png").symlink_to(outside / "a.png")
    (inside / "folder").mkdir()
    os.mkfifo(inside / "pipe")
    roots = {"local_roots": (inside,)}
    (inside / "ä b.png").write_bytes(picture())
    assert read(str(inside / "a.png"), **roots) == (6, 4)
    for url in (
        (inside / "a.png").as_uri(),
        (inside / "ä b.png").as_uri(),
        f"file://localhost{inside}/a.png",
        f"file:{inside}/%61.png",
    ):
        assert read(url, **roots) == (6, 4)
    for path in (
        outside / "a.png",
        inside / "../media-private/a.png",
        inside / "link.png",
        inside / "folder",
        inside / "pipe",
        inside / "missing.png",
        "/dev/zero",
        f"{inside}/a.png\0",
        (outside / "a.png").as_uri(),
        f"file://{inside}/../media-private/a.png",
        f"file://{inside}/%2e%2e/media-private/a.png",
        f"file://{inside}/link.png",
        f"file://{inside}/a.png%00",
        f"file://{inside}/a.png?x",
        f"file://host{inside}/a.png",
        "file:a.png",
        "file:",
    ):
        assert read(str(path), **roots) == "local_path_not_allowed"
