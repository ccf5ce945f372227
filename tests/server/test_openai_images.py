"""The image methods of the official OpenAI SDK: waiting and streaming, sync and async."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from sgl_diffusion.base import errors


def png(width: int = 64, height: int = 48, alpha: int | None = None) -> bytes:
    buffer = io.BytesIO()
    color = (9, 8, 7) if alpha is None else (9, 8, 7, alpha)
    Image.new("RGB" if alpha is None else "RGBA", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["strict", "loose"])
def sdk(base_url: str, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    strict = request.param == "strict"
    with openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="none", max_retries=0, _strict_response_validation=strict
    ) as client:
        yield client


def size_of(b64: str | None) -> tuple[int, int]:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64))).size


def test_edit_with_one_picture(sdk: openai.OpenAI, api: Any) -> None:
    answer = sdk.images.edit(
        image=png(), prompt="x", extra_body={"strength": 0.3, "seed": 4, "num_inference_steps": 2}
    )
    assert answer.data is not None and size_of(answer.data[0].b64_json) == (64, 48)
    params = api.client.submitted[-1]
    assert (params.strength, params.seeds, params.num_inference_steps) == (0.3, (4,), 2)


def test_edit_with_several_pictures_and_a_mask(sdk: openai.OpenAI, api: Any) -> None:
    api.client.model = dataclasses.replace(api.client.model, edits="native", max_images=4)
    answer = sdk.images.edit(
        image=[png(), ("b.png", png(32, 32)), io.BytesIO(png(16, 16))],
        mask=png(alpha=0),
        prompt="x",
        n=2,
        size="256x256",
        input_fidelity="high",
        output_format="webp",
    )
    assert answer.data is not None and len(answer.data) == 2
    assert answer.output_format == "webp" and answer.size == "256x256"
    params = api.client.submitted[-1]
    assert len(params.images) == 3 and params.mask is not None


def test_streams(sdk: openai.OpenAI) -> None:
    made = sdk.images.generate(prompt="x", stream=True, partial_images=2, output_format="jpeg")
    events = list(made)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert all(size_of(event.b64_json) == (64, 48) for event in events)
    edited = list(sdk.images.edit(image=png(), prompt="x", stream=True, partial_images=1))
    assert [event.type for event in edited] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_stream_that_fails_raises(sdk: openai.OpenAI, api: Any) -> None:
    api.client.fail_with = errors.EngineError("Bad luck.")
    stream = sdk.images.generate(prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="Bad luck") as raised:
        list(stream)
    assert raised.value.code == "engine_error"


def test_a_stream_that_is_closed_cancels(sdk: openai.OpenAI, api: Any) -> None:
    api.client.turns = asyncio.Semaphore(3)
    stream = sdk.images.generate(
        prompt="x", stream=True, partial_images=1, extra_body={"num_inference_steps": 200}
    )
    assert next(iter(stream)).type == "image_generation.partial_image"
    stream.close()

    async def cancelled() -> None:
        while not api.client.cancelled:
            await asyncio.sleep(0.01)

    api.run(cancelled())


def test_refusals(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        sdk.images.edit(image=b"no picture", prompt="x")
    assert (raised.value.code, raised.value.param) == ("unsupported_image_format", "image")
    with pytest.raises(openai.NotFoundError) as gone, pytest.warns(DeprecationWarning):
        sdk.images.create_variation(image=png())
    assert gone.value.code == "not_supported"


def test_the_async_client(base_url: str, api: Any) -> None:
    async def use() -> list[str]:
        client = openai.AsyncOpenAI(
            base_url=f"{base_url}/v1",
            api_key="none",
            max_retries=0,
            _strict_response_validation=True,
        )
        async with client:
            made, edited = await asyncio.gather(
                client.images.generate(prompt="x", n=2), client.images.edit(image=png(), prompt="x")
            )
            assert made.data is not None and len(made.data) == 2
            assert edited.data is not None and size_of(edited.data[0].b64_json) == (64, 48)
            stream = await client.images.generate(prompt="x", stream=True, partial_images=3)
            return [event.type async for event in stream]

    # A loop of its own: the server's must stay free to answer.
    names = asyncio.run(use())
    assert names == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
