"""Streamed images: events in OpenAI's shapes, keep-alives, errors after the first byte, leaving."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.base import errors
from sgl_diffusion.server import sse

PATH = "/v1/images/generations"


def events_of(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith(":")]
        if lines:
            name, data = lines
            found.append(json.loads(data.removeprefix("data: ")))
            kind = found[-1].get("type", "error")
            assert name == f"event: {kind}"
    return found


def picture(event: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))) as opened:
        return np.asarray(opened).astype(float)


def test_partial_pictures_come_first(api: Any) -> None:
    body = {"prompt": "x", "stream": True, "partial_images": 2, "size": "64x48"}
    events = events_of(api.post(PATH, json=body))
    assert [event["type"] for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event["partial_image_index"] for event in events[:2]] == [0, 1]
    for event in events:
        assert event["size"] == "64x48" and event["output_format"] == "png"
        assert event["background"] == "opaque" and event["quality"] == "auto"
        assert isinstance(event["created_at"], int)
        assert picture(event).shape == (48, 64, 3)
    assert picture(events[0]).mean() < picture(events[2]).mean()
    assert events[2]["usage"]["total_tokens"] == 0
    assert api.get(events[2]["url"]).content == base64.b64decode(events[2]["b64_json"])


def test_comments_say_where_it_stands(api: Any, base_url: str) -> None:
    """Its place while it waits, then its steps: readers of events pass them over."""
    body = {"prompt": "x", "stream": True, "num_inference_steps": 3}
    notes, names = [], []
    api.call(api.client.gate.clear)
    with httpx.stream("POST", base_url + PATH, json=body, timeout=30) as answer:
        for line in answer.iter_lines():
            if line.startswith(": {"):
                notes.append(json.loads(line[2:]))
                api.call(api.client.gate.set)
            elif line.startswith("event: "):
                names.append(line)
    assert notes[0] == {"queue_position": 0, "eta_s": None}
    assert notes[-1]["step"] == 3 and {note["steps"] for note in notes[1:]} == {3}
    assert names == ["event: image_generation.completed"]


def test_every_output_ends_with_an_event_of_its_own(api: Any) -> None:
    body = {
        "prompt": "x",
        "stream": True,
        "partial_images": 1,
        "n": 2,
        "response_format": "b64_json",
    }
    events = events_of(api.post(PATH, json=body))
    ends = [event for event in events if event["type"] == "image_generation.completed"]
    assert [(event["image_index"], event["seed"], event["url"]) for event in ends] == [
        (0, 42, None),
        (1, 43, None),
    ]
    assert len(events) == 4 and not list((api.folder / "images").iterdir())


def test_without_partial_pictures_there_is_the_end_only(api: Any) -> None:
    (event,) = events_of(api.post(PATH, json={"prompt": "x", "stream": True, "quality": "high"}))
    assert event["type"] == "image_generation.completed" and event["quality"] == "high"


def test_edits_have_names_of_their_own(api: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, format="PNG")
    answer = api.post(
        "/v1/images/edits",
        data={"prompt": "x", "stream": "true", "partial_images": "1"},
        files={"image": ("a.png", buffer.getvalue())},
    )
    names = [event["type"] for event in events_of(answer)]
    assert names == ["image_edit.partial_image", "image_edit.completed"]
    assert not list((api.folder / "inputs").iterdir())


def test_an_error_after_the_first_byte_is_an_event(api: Any) -> None:
    api.client.fail_with = errors.OutOfMemoryError("Too large.", hint="Ask for less.")
    body = {"prompt": "x", "stream": True, "partial_images": 1}
    *_, last = events_of(api.post(PATH, json=body))
    assert last["error"]["code"] == "out_of_memory" and last["error"]["type"] == "server_error"
    assert last["detail"] == "Too large. Ask for less."


def test_a_foreign_exception_says_nothing(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> bytes:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("sgl_diffusion.server.image_job.encode_image", broken)
    answer = api.post(PATH, json={"prompt": "x", "stream": True})
    (event,) = events_of(answer)
    assert event["error"]["code"] == "internal_error" and "secret" not in answer.text


def test_an_error_before_the_first_byte_is_a_status(api: Any) -> None:
    api.client.refuse_with = errors.BusyError("Full.", retry_after=3)
    answer = api.post(PATH, json={"prompt": "x", "stream": True})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"


def test_a_worker_that_died_shows_nothing_twice(api: Any) -> None:
    from sgl_diffusion.client.types import Event
    from tests.server.conftest import FakeHandle

    class Again(FakeHandle):
        async def events(self) -> Any:
            for _ in range(2):
                for event in self._parts(0, 2):
                    yield event
            await self._done.wait()
            yield Event("done", self.snapshot())

    original = FakeHandle.events
    FakeHandle.events = Again.events
    try:
        body = {"prompt": "x", "stream": True, "partial_images": 2}
        events = events_of(api.post(PATH, json=body))
    finally:
        FakeHandle.events = original
    assert [event.get("partial_image_index") for event in events] == [0, 1, None]


def test_events_are_kept_from_the_moment_the_job_is_taken(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial pictures may be made before the answer has begun."""
    from tests.server.conftest import FakeHandle

    order = []
    events, begin = FakeHandle.events, sse.EventStream.__call__

    def noted_events(handle: FakeHandle) -> Any:
        order.append("events")
        return events(handle)

    async def noted_begin(stream: sse.EventStream, *connection: Any) -> None:
        order.append("answer")
        await begin(stream, *connection)

    monkeypatch.setattr(FakeHandle, "events", noted_events)
    monkeypatch.setattr(sse.EventStream, "__call__", noted_begin)
    events_of(api.post(PATH, json={"prompt": "x", "stream": True, "partial_images": 1}))
    assert order == ["events", "answer"]


def test_silence_is_filled_with_comments() -> None:
    async def slow() -> Any:
        yield 1
        await asyncio.sleep(0.12)
        yield 2

    async def collect() -> list[int | None]:
        return [item async for item in sse.with_pings(slow(), 0.05)]

    assert asyncio.run(collect()) == [1, None, None, 2]
    assert sse.PING == b": ping\n\n" and sse.PING_SECONDS == 15.0


@pytest.mark.parametrize("after", ["the headers", "a partial picture"])
def test_leaving_cancels_the_job(api: Any, base_url: str, after: str) -> None:
    """Over a real socket: the connection is closed while the job runs."""
    partial = after == "a partial picture"
    if partial:
        api.client.turns = asyncio.Semaphore(3)
    else:
        api.call(api.client.gate.clear)

    async def leave() -> None:
        host, port = base_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(
            {"prompt": "x", "stream": True, "partial_images": 1, "num_inference_steps": 200}
        ).encode()
        writer.write(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        await writer.drain()
        await reader.readuntil(b"partial_image" if partial else b"text/event-stream")
        writer.close()
        while not api.client.cancelled:
            await asyncio.sleep(0.01)

    api.run(leave())
    assert not list((api.folder / "images").iterdir())


def test_the_same_request_gets_the_same_pictures(api: Any) -> None:
    body = {"prompt": "x", "stream": True, "n": 2}
    headers = {"idempotency-key": "one-stream"}
    first = events_of(api.post(PATH, json=body, headers=headers))
    again = events_of(api.post(PATH, json=body, headers=headers))
    assert again == first and len(api.client.submitted) == 1
    assert api.get("/v1/images").json()["data"][0]["id"] == first[0]["id"]
    assert len(list(api.context.files.images.iterdir())) == 2
    for path in api.context.files.images.iterdir():
        path.unlink()
    made_anew = events_of(api.post(PATH, json=body, headers=headers))
    assert made_anew[0]["id"] != first[0]["id"] and len(api.client.submitted) == 2
    assert api.get(made_anew[1]["url"]).content == base64.b64decode(made_anew[1]["b64_json"])


def test_two_streams_of_one_request_leave_one_set_of_files(api: Any) -> None:
    api.client.step_seconds = 0.02
    body, headers = {"prompt": "x", "stream": True}, {"idempotency-key": "twice"}

    async def both() -> list[Any]:
        sent = (api.http.post(PATH, json=body, headers=headers) for _ in range(2))
        return list(await asyncio.gather(*sent))

    urls = {events_of(answer)[-1]["url"] for answer in api.run(both())}
    assert len(urls) == 1 and len(list(api.context.files.images.iterdir())) == 1
    assert api.get(urls.pop()).status_code == 200
