"""POST /v1/images/edits, in process: what reaches the worker, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.base import errors
from sgl_diffusion.base.config import JobOptions
from sgl_diffusion.base.params import ResolvedParams

PATH = "/v1/images/edits"
UNIT = 16


def png(width: int = 64, height: int = 48, color: Any = (200, 10, 90), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), color).save(buffer, format="PNG")
    return buffer.getvalue()


def file(data: bytes | None = None, name: str = "in.png") -> tuple[str, bytes, str]:
    return (name, png() if data is None else data, "application/octet-stream")


class Spy:
    """Looks at the input files of a job at the moment it is submitted."""

    def __init__(self, api: Any) -> None:
        self.pictures: list[Image.Image] = []
        self.mask: Image.Image | None = None
        self._submit = api.client.submit
        api.client.submit = self._look

    async def _look(self, params: ResolvedParams, **more: Any) -> Any:
        self.pictures = [self._open(path) for path in params.images]
        self.mask = None if params.mask is None else self._open(params.mask)
        return await self._submit(params, **more)

    def _open(self, path: str) -> Image.Image:
        with Image.open(path) as picture:
            picture.load()
            return picture


def edit(api: Any, files: Any = None, **data: Any) -> Any:
    given = files if files is not None else {"image": file()}
    return api.post(PATH, data={"prompt": "a cat", **data}, files=given)


def test_a_picture_reaches_the_worker_and_its_file_goes(api: Any) -> None:
    spy = Spy(api)
    answer = edit(api, strength="0.4", seed="7", n="2")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["seeds"] == [7, 8] and len(body["data"]) == 2 and body["size"] == "64x48"
    (picture,) = spy.pictures
    assert picture.getpixel((0, 0)) == (200, 10, 90) and spy.mask is None
    (params,) = api.client.submitted
    assert params.strength == 0.4 and params.num_frames == 1
    assert Path(params.images[0]).is_relative_to(api.folder / "inputs")
    assert not list((api.folder / "inputs").iterdir())


def test_the_answer_is_that_of_generations(api: Any) -> None:
    answers = [edit(api).json(), api.post("/v1/images/generations", json={"prompt": "x"}).json()]
    assert answers[0].keys() == answers[1].keys()
    kept = api.get(answers[0]["data"][0]["url"])
    assert kept.content == base64.b64decode(answers[0]["data"][0]["b64_json"])


@pytest.mark.parametrize(
    "names", [["image"], ["image[]"], ["image", "image"], ["image", "image[]"]]
)
def test_pictures_come_under_every_name(api: Any, names: list[str]) -> None:
    api.client.model = dataclasses.replace(api.client.model, edits="native", max_images=3)
    spy = Spy(api)
    colors = [(10 * index, 0, 0) for index in range(len(names))]
    files = [(name, file(png(color=color))) for name, color in zip(names, colors, strict=True)]
    assert edit(api, files).status_code == 200
    assert [picture.getpixel((0, 0)) for picture in spy.pictures] == colors
    assert api.client.submitted[-1].strength is None


def test_urls_are_read_through_the_guard(api: Any) -> None:
    api.client.model = dataclasses.replace(api.client.model, edits="native", max_images=3)
    spy = Spy(api)
    address = "data:image/png;base64," + base64.b64encode(png(color=(1, 2, 3))).decode()
    answer = edit(api, {"image": file()}, **{"url[]": [address, address]})
    assert answer.status_code == 200, answer.text
    assert [picture.getpixel((0, 0)) for picture in spy.pictures[1:]] == [(1, 2, 3)] * 2
    for url, code in (
        ("http://127.0.0.1:6379/x.png", "url_not_allowed"),
        ("file:///etc/passwd", "local_path_not_allowed"),
        ("image_url.jpg", "unsupported_url_scheme"),
        ("/etc/passwd", "local_path_not_allowed"),
    ):
        error = edit(api, {"image": file()}, url=url).json()["error"]
        assert (error["code"], error["param"]) == (code, "url")


@pytest.mark.parametrize(
    ("picture", "wanted", "size"),
    [
        ((64, 48), {}, (64, 48)),
        ((640, 480), {}, (64, 48)),
        ((100, 100), {}, (48, 48)),
        ((300, 100), {}, (96, 32)),
        ((10, 4000), {}, (16, 1104)),
        ((100, 100), {"size": "auto"}, (48, 48)),
        ((100, 100), {"size": "32x80"}, (32, 80)),
        ((100, 100), {"width": "80"}, (80, 80)),
        ((200, 100), {"height": "48"}, (96, 48)),
    ],
)
def test_the_output_has_the_shape_of_the_picture(
    api: Any, picture: tuple[int, int], wanted: dict[str, str], size: tuple[int, int]
) -> None:
    answer = edit(api, {"image": file(png(*picture))}, **wanted)
    assert answer.status_code == 200, answer.text
    params = api.client.submitted[-1]
    assert (params.width, params.height) == size


def test_a_mask_reaches_the_worker_as_it_is(api: Any) -> None:
    spy = Spy(api)
    pixels = np.full((48, 64, 4), 255, np.uint8)
    pixels[:, 32:, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    answer = edit(api, {"image": file(), "mask": file(buffer.getvalue())})
    assert answer.status_code == 200, answer.text
    assert spy.mask is not None and np.array_equal(np.asarray(spy.mask), pixels)
    assert api.client.submitted[-1].strength == 1.0, "what is marked is made anew"
    assert edit(api, {"image": file(), "mask": file()}, strength="0.5").status_code == 200
    assert api.client.submitted[-1].strength == 0.5


@pytest.mark.parametrize(
    ("files", "data", "code", "param"),
    [
        ({}, {}, "missing_parameter", "image"),
        ({"image": file(b"no picture")}, {}, "unsupported_image_format", "image"),
        ({"image": file(b"")}, {}, "file_expected", "image"),
        ({"image": file(png()[:60])}, {}, "invalid_image", "image"),
        ({}, {"image": "a text"}, "file_expected", "image"),
        ({"image": file()}, {"mask": "a text"}, "file_expected", "mask"),
        ({"image": file(), "mask": file(png(32, 48))}, {}, "invalid_mask", "mask"),
        ([("image", file()), ("image", file())], {}, "too_many_images", "image"),
        ([("image[]", file())] * 17, {}, "too_many_images", "image"),
        ({"image": file()}, {"strength": "1.5"}, "out_of_range", "strength"),
        ({"image": file()}, {"strength": "much"}, "invalid_type", "strength"),
        ({"image": file()}, {"strength": "nan"}, "not_finite", "strength"),
        ({"image": file()}, {"prompt": " "}, "prompt_empty", "prompt"),
        ({"image": file()}, {"size": "50x50"}, "invalid_size", "size"),
        ({"image": file()}, {"imgae": "x"}, "unknown_parameter", "imgae"),
        ({"image": file()}, {"input_fidelity": "exact"}, "unsupported_parameter", "input_fidelity"),
        ({"image": file(), "markup": file()}, {}, "unsupported_parameter", "markup"),
        ({"image": file()}, {"num_frames": "5"}, "unsupported_parameter", "num_frames"),
        ({"image": file()}, {"partial_images": "1"}, "conflicting_parameters", "partial_images"),
    ],
)
def test_wrong_edits(api: Any, files: Any, data: dict[str, Any], code: str, param: str) -> None:
    if files:
        answer = edit(api, files, **data)
    else:  # httpx would send a form without files as urlencoded
        parts = {name: (None, text) for name, text in {"prompt": "x", **data}.items()}
        answer = api.post(PATH, files=parts)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert not api.client.submitted and not list((api.folder / "inputs").iterdir())


def test_json_is_no_edit(api: Any) -> None:
    answer = api.post(PATH, json={"prompt": "x"})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"
    form = api.post("/v1/images/generations", files={"image": file()})
    assert form.status_code == 415


@pytest.mark.parametrize(
    ("card", "data", "code"),
    [
        ({"edits": "none", "max_images": 0}, {}, "edits_not_supported"),
        ({"edits": "native"}, {"strength": "0.5"}, "unsupported_parameter"),
        ({"masks": False}, {"mask": ""}, "unsupported_parameter"),
        ({"previews": False}, {"stream": "true", "partial_images": "1"}, "streaming_not_supported"),
    ],
)
def test_what_the_model_cannot_do(
    api: Any, card: dict[str, Any], data: dict[str, Any], code: str
) -> None:
    api.client.model = dataclasses.replace(api.client.model, **card)
    files = {"image": file()}
    if "mask" in data:
        files["mask"] = file()
        data = {}
    answer = edit(api, files, **data)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert not list((api.folder / "inputs").iterdir())


def test_a_model_that_needs_a_picture_makes_none_from_words(api: Any) -> None:
    api.client.model = dataclasses.replace(
        api.client.model, edits="native", min_images=1, max_images=3
    )
    answer = api.post("/v1/images/generations", json={"prompt": "x"})
    assert answer.json()["error"]["code"] == "image_required"
    assert edit(api).status_code == 200


@pytest.mark.parametrize("failure", [errors.EngineError("Bad."), errors.BusyError("Full.")])
def test_a_failed_edit_leaves_no_files(api: Any, failure: errors.SglError) -> None:
    if isinstance(failure, errors.BusyError):
        api.client.refuse_with = failure
    else:
        api.client.fail_with = failure
    assert edit(api).status_code in (429, 500)
    assert not list((api.folder / "inputs").iterdir())
    assert not list((api.folder / "images").iterdir())


def test_inputs_of_a_server_that_died_are_swept(make_api: Any, tmp_path: Path) -> None:
    left = tmp_path / "inputs" / "image_0123456789"
    left.mkdir(parents=True)
    (left / "0.png").write_bytes(png())
    video = tmp_path / "inputs" / "video_0123456789"
    video.mkdir()
    make_api()
    assert not left.exists() and video.exists()


def test_the_health_of_a_model_that_needs_a_picture(api: Any) -> None:
    api.client.model = dataclasses.replace(
        api.client.model, edits="native", min_images=1, max_images=3
    )
    assert api.get("/health_generate").status_code == 200
    (params,) = api.client.submitted
    assert len(params.images) == 1 and not Path(params.images[0]).exists()


def test_a_repeated_or_refused_edit_leaves_no_files(make_api: Any) -> None:
    api = make_api(jobs=JobOptions(max_queue=1))
    headers = {"idempotency-key": "one-edit"}
    files, data = [("image", file())], {"prompt": "x"}
    path = "/v1/images/edits"

    async def send(count: int, **more: Any) -> list[int]:
        sent = (api.http.post(path, files=files, data=data, **more) for _ in range(count))
        return [answer.status_code for answer in await asyncio.gather(*sent)]

    api.client.step_seconds = 0.05
    assert api.run(send(3, headers=headers)) == [200] * 3  # at once: one job for all
    assert api.run(send(1, headers=headers)) == [200]  # and its answer later on
    assert len(api.client.submitted) == 1
    assert sorted(api.run(send(2))) == [200, 429]
    assert not list((api.folder / "inputs").iterdir())
