"""The official SDK, unchanged, against a real server with the tiny model: every method it has.

Each test runs with the synchronous and the asynchronous client; the strict ones refuse every answer
that is not of the documented type.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any

import av
import openai
import pytest
from openai.resources import images, models, videos
from PIL import Image

# OpenAI retires its own video service; the calls stay the way to talk to servers like this one.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

SMALL: dict[str, Any] = {"num_inference_steps": 1, "num_frames": 5, "seed": 3}


class Sdk:
    """One client; `do` waits for what the asynchronous one returns."""

    def __init__(self, url: str, *, asynchronous: bool, strict: bool, retries: int = 0) -> None:
        kind = openai.AsyncOpenAI if asynchronous else openai.OpenAI
        self._loop = asyncio.new_event_loop()
        self.client: Any = kind(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=retries,
            _strict_response_validation=strict,
        )

    def do(self, call: Callable[[Any], Any]) -> Any:
        result = call(self.client)
        return self._loop.run_until_complete(result) if inspect.isawaitable(result) else result

    def all(self, call: Callable[[Any], Any]) -> list[Any]:
        """Every item of a page or a stream."""
        source = call(self.client)
        if not isinstance(self.client, openai.AsyncOpenAI):
            return list(source)

        async def collect() -> list[Any]:
            items = await source if inspect.isawaitable(source) else source
            return [item async for item in items]

        return self._loop.run_until_complete(collect())

    def streamed(self, call: Callable[[Any], Any]) -> tuple[Any, bytes]:
        """Headers and bytes of `with_streaming_response`."""
        manager = call(self.client)
        if not isinstance(self.client, openai.AsyncOpenAI):
            with manager as answer:
                return answer.headers, b"".join(answer.iter_bytes())

        async def read() -> tuple[Any, bytes]:
            async with manager as answer:
                return answer.headers, b"".join([piece async for piece in answer.iter_bytes()])

        return self._loop.run_until_complete(read())

    def close(self) -> None:
        self.do(lambda client: client.close())
        self._loop.close()


@pytest.fixture(params=["sync", "async"])
def loose(request: pytest.FixtureRequest, server: Any) -> Iterator[Sdk]:
    sdk = Sdk(server.url, asynchronous=request.param == "async", strict=False)
    yield sdk
    sdk.close()


@pytest.fixture(params=["sync", "async"])
def strict(request: pytest.FixtureRequest, server: Any) -> Iterator[Sdk]:
    sdk = Sdk(server.url, asynchronous=request.param == "async", strict=True)
    yield sdk
    sdk.close()


def methods(resource: type) -> set[str]:
    return {
        name
        for name, value in vars(resource).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def test_no_method_is_forgotten():
    """A new SDK with a new method: it has to be served or refused, and tested here."""
    assert methods(videos.Videos) == {
        "create", "retrieve", "list", "delete", "create_character", "download_content", "edit",
        "extend", "get_character", "remix", "create_and_poll", "poll",
    }  # fmt: skip
    assert methods(images.Images) == {"create_variation", "edit", "generate"}
    assert methods(models.Models) == {"retrieve", "list", "delete"}


def video(sdk: Sdk, **more: Any) -> Any:
    body = {"prompt": "waves", "size": "64x48", "extra_body": SMALL, **more}
    return sdk.do(lambda client: client.videos.create_and_poll(**body, poll_interval_ms=100))


@pytest.fixture(scope="module")
def large(server: Any) -> str:
    """A video of a size that OpenAI's own types know; there are four."""
    body = {"size": "720x1280", "num_frames": 1, "num_inference_steps": 1}
    made = server.video(**body)
    assert server.finished(made)["status"] == "completed"
    return str(made)


def test_strict_videos(strict, large):
    done = strict.do(lambda client: client.videos.poll(large))
    assert done.status == "completed" and done.size == "720x1280" and done.seconds == "1"
    assert strict.do(lambda client: client.videos.retrieve(large)) == done
    started = [
        strict.do(
            lambda client: client.videos.create(
                prompt="waves", size="720x1280", extra_body={"num_frames": 1}
            )
        ),
        strict.do(lambda client: client.videos.remix(large, prompt="a storm")),
    ]
    assert started[1].remixed_from_video_id == large and started[1].prompt == "a storm"
    page = strict.do(lambda client: client.videos.list(limit=2))
    assert {entry.id for entry in page.data} == {entry.id for entry in started}
    for entry in started:  # before anybody has to wait for them
        gone = strict.do(lambda client, entry=entry: client.videos.delete(entry.id))
        assert gone.deleted is True and gone.object == "video.deleted" and gone.id == entry.id


def test_strict_images_and_models(strict):
    answer = strict.do(
        lambda client: client.images.generate(
            prompt="a fox", n=2, size="64x48", quality="high", output_format="webp",
            extra_body={"num_inference_steps": 1},
        )
    )  # fmt: skip
    assert len(answer.data) == 2 and answer.output_format == "webp" and answer.quality == "high"
    for entry in answer.data:
        picture = Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))
        assert picture.size == (64, 48) and picture.format == "WEBP"
    listed = strict.all(lambda client: client.models.list())
    assert strict.do(lambda client: client.models.retrieve(listed[0].id)) == listed[0]


def test_streamed_images(strict):
    events = strict.all(
        lambda client: client.images.generate(
            prompt="a fox", size="64x48", stream=True, partial_images=2,
            extra_body={"num_inference_steps": 6},
        )
    )  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    for event in events:
        picture = Image.open(io.BytesIO(base64.b64decode(event.b64_json)))
        assert picture.size == (64, 48)


def png(level: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (level, 20, 200)).save(buffer, format="png")
    return buffer.getvalue()


def test_edits(strict):
    answer = strict.do(
        lambda client: client.images.edit(
            image=png(), prompt="brighter", size="64x48",
            extra_body={"num_inference_steps": 2, "strength": 0.5},
        )
    )  # fmt: skip
    picture = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert picture.size == (64, 48)


def test_content_and_its_variants(loose):
    made = video(loose)
    starts = {"video": (b"ftyp", 4), "thumbnail": (b"WEBP", 8), "spritesheet": (b"\xff\xd8", 0)}
    for variant, (magic, at) in starts.items():
        answer = loose.do(
            lambda client, variant=variant: client.videos.download_content(made.id, variant=variant)
        )
        assert answer.content[at : at + len(magic)] == magic
    data = loose.do(lambda client: client.videos.download_content(made.id)).content
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 5
    headers, streamed = loose.streamed(
        lambda client: client.videos.with_streaming_response.download_content(made.id)
    )
    assert streamed == data and headers["content-type"] == "video/mp4" and headers["etag"]
    headers, piece = loose.streamed(
        lambda client: client.videos.with_streaming_response.download_content(
            made.id, extra_headers={"Range": "bytes=4-7"}
        )
    )
    assert piece == data[4:8] == b"ftyp" and headers["content-range"].startswith("bytes 4-7/")


def test_raw_answers(loose):
    raw = loose.do(
        lambda client: client.videos.with_raw_response.create(
            prompt="waves", size="64x48", extra_body=SMALL
        )
    )
    made = raw.parse()
    assert raw.headers["x-request-id"] and int(raw.headers["openai-poll-after-ms"]) > 0
    done = loose.do(lambda client: client.videos.poll(made.id))
    assert done.status == "completed" and done.num_frames == 5 and done.seed == 3


def test_pages(loose):
    made = [video(loose, extra_body={**SMALL, "num_frames": 1}).id for _ in range(3)]
    newest = loose.all(lambda client: client.videos.list(limit=2))
    assert [entry.id for entry in newest][:3] == made[::-1]
    oldest = loose.all(lambda client: client.videos.list(limit=2, order="asc"))
    assert [entry.id for entry in oldest] == [entry.id for entry in newest][::-1]
    rest = loose.do(lambda client: client.videos.list(after=made[1], limit=1))
    assert [entry.id for entry in rest.data] == made[:1]


REFUSED: list[tuple[str, Callable[[Any], Any], type[openai.APIStatusError], str]] = [
    ("no such video", lambda c: c.videos.retrieve("video_0123456789"),
     openai.NotFoundError, "video_not_found"),
    ("no such file", lambda c: c.videos.download_content("video_0123456789"),
     openai.NotFoundError, "video_not_found"),
    ("no such remix", lambda c: c.videos.remix("video_0123456789", prompt="x"),
     openai.NotFoundError, "video_not_found"),
    ("nothing to delete", lambda c: c.videos.delete("video_0123456789"),
     openai.NotFoundError, "video_not_found"),
    ("path tricks", lambda c: c.videos.retrieve("../../etc/passwd"),
     openai.NotFoundError, "video_not_found"),
    ("edit", lambda c: c.videos.edit(prompt="x", video=b"\0"),
     openai.NotFoundError, "not_supported"),
    ("extend", lambda c: c.videos.extend(prompt="x", seconds="4", video=b"\0"),
     openai.NotFoundError, "not_supported"),
    ("character", lambda c: c.videos.create_character(name="x", video=b"\0"),
     openai.NotFoundError, "not_supported"),
    ("get character", lambda c: c.videos.get_character("x"),
     openai.NotFoundError, "not_supported"),
    ("size", lambda c: c.videos.create(prompt="x", size="1000x1001"),
     openai.BadRequestError, "invalid_size"),
    ("length", lambda c: c.videos.create(prompt="x", seconds="0"),
     openai.BadRequestError, "out_of_range"),
    ("picture", lambda c: c.videos.create(prompt="x", input_reference=png()),
     openai.BadRequestError, "unsupported_parameter"),
    ("prompt", lambda c: c.images.generate(prompt=" "),
     openai.BadRequestError, "prompt_empty"),
    ("cursor", lambda c: c.videos.list(after="video_0123456789"),
     openai.BadRequestError, "invalid_cursor"),
    ("no such model", lambda c: c.models.retrieve("org/name"),
     openai.NotFoundError, "model_not_found"),
    ("model of a request", lambda c: c.images.generate(prompt="x", model="dall-e-3"),
     openai.NotFoundError, "model_not_found"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refusals_have_their_class_and_code(loose, call, kind, code):
    async def awaited(client):
        return await call(client)

    with pytest.raises(kind) as raised:
        loose.do(awaited if isinstance(loose.client, openai.AsyncOpenAI) else call)
    error = raised.value
    assert error.code == code and error.request_id and error.type and error.message


def test_the_served_model_is_not_deleted(loose):
    model = loose.all(lambda client: client.models.list())[0]  # its adapters follow
    with pytest.raises(openai.PermissionDeniedError):
        loose.do(lambda client: client.models.delete(model.id))


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_a_variation_is_refused(loose):
    with pytest.raises(openai.APIStatusError) as raised:
        loose.do(lambda client: client.images.create_variation(image=png()))
    assert raised.value.status_code in (400, 404)


def test_a_conflict_is_sent_once(server):
    for asynchronous in (False, True):
        sdk = Sdk(server.url, asynchronous=asynchronous, strict=False, retries=2)
        slow = {**SMALL, "num_inference_steps": 60, "num_frames": 17}
        made = sdk.do(lambda c, slow=slow: c.videos.create(prompt="x", extra_body=slow))
        with pytest.raises(openai.ConflictError) as raised:
            sdk.do(lambda c, made=made: c.videos.download_content(made.id))
        retries = raised.value.response.request.headers["x-stainless-retry-count"]
        assert raised.value.code == "video_not_ready" and retries == "0"
        assert sdk.do(lambda c, made=made: c.videos.delete(made.id)).deleted
        sdk.close()
