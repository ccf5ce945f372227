"""Edits and streams against a real server with the real tiny model, by the OpenAI SDK."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.e2e.server import Server

SIZE = (96, 64)


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    server.wait_ready()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def picture() -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))


def pixels(b64: str | None) -> Any:
    assert b64 is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64)))).astype(float)


def edit(sdk: openai.OpenAI, **more: Any) -> Any:
    extra = {"num_inference_steps": 4, "seed": 3, **more.pop("extra_body", {})}
    answer = sdk.images.edit(
        image=png(picture()), prompt="a fox", size="96x64", extra_body=extra, **more
    )
    assert answer.data is not None
    return pixels(answer.data[0].b64_json)


def test_strength_from_the_picture_to_the_prompt(sdk: openai.OpenAI) -> None:
    same, near, free = (
        edit(sdk, extra_body={"strength": strength}) for strength in (0.0, 0.5, 1.0)
    )
    assert 0 < np.abs(near - same).mean()
    made = sdk.images.generate(
        prompt="a fox", size="96x64", extra_body={"num_inference_steps": 4, "seed": 3}
    )
    assert made.data is not None
    assert np.array_equal(free, pixels(made.data[0].b64_json))


def test_outside_the_mask_nothing_changes(sdk: openai.OpenAI) -> None:
    alpha = np.full((SIZE[1], SIZE[0], 4), 255, np.uint8)
    alpha[16:48, 32:64, 3] = 0
    masked = edit(sdk, mask=png(Image.fromarray(alpha)))
    given = np.asarray(picture()).astype(float)
    outside = alpha[..., 3] == 255
    assert np.array_equal(masked[outside], given[outside])
    assert np.abs(masked[~outside] - given[~outside]).mean() > 5


def test_a_stream_approaches_the_picture(sdk: openai.OpenAI, server: Server) -> None:
    stream = sdk.images.generate(
        prompt="a fox",
        size="96x64",
        stream=True,
        partial_images=3,
        extra_body={"num_inference_steps": 8},
    )
    frames = [pixels(event.b64_json) for event in stream]
    assert len(frames) == 4
    away = [float(np.square(frame - frames[-1]).mean()) for frame in frames]
    assert away[0] > away[1] > away[2] > away[3] == 0.0


def test_a_stream_of_an_edit(sdk: openai.OpenAI) -> None:
    stream = sdk.images.edit(
        image=png(picture()), prompt="x", size="96x64", stream=True, partial_images=1
    )
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_kept_file_says_how_it_was_made(server: Server) -> None:
    for kind in ("png", "jpeg", "webp"):
        made = server.http.post(
            "/v1/images/generations",
            json={
                "prompt": "ein Fuchs über 🦊",
                "size": "64x64",
                "num_inference_steps": 1,
                "output_format": kind,
                "response_format": "url",
            },
        ).json()
        with Image.open(io.BytesIO(server.http.get(made["data"][0]["url"]).content)) as opened:
            if kind == "png":
                text = opened.text["sgl_diffusion"]
            else:
                comment = opened.getexif().get_ifd(0x8769)[0x9286]
                assert comment.startswith(b"ASCII\0\0\0")
                text = comment[8:].decode("ascii")
        settings = json.loads(text)
        assert settings["prompt"] == "ein Fuchs über 🦊" and settings["seed"] == 42


def test_no_input_stays(sdk: openai.OpenAI, server: Server, tmp_path: Path) -> None:
    edit(sdk)
    data = Path(server.log.parent / "data")
    assert not list((data / "inputs").iterdir())
