"""Clients that leave, and what the server does when it cannot answer."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from sgl_diffusion.ar.worker import ChatWorker
from sgl_diffusion.base.errors import EngineError
from sgl_diffusion.orchestrator.limits import Health
from sgl_diffusion.orchestrator.stage_loop import StageLoop
from tests.ar.chats import part
from tests.server.omni.conftest import OmniApi, chunks_of

pytestmark = pytest.mark.timeout(400)

LONG = {"messages": [{"role": "user", "content": "a bird"}], "temperature": 1.0, "seed": 1}
ENDLESS = {"max_tokens": 4000, "modalities": ["text", "audio"], "stop": []}


def send(omni: OmniApi, path: str, body: dict[str, Any]) -> socket.socket:
    """A request whose answer is not waited for."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", omni._port))
    connection.sendall(head.encode() + data)
    return connection


@pytest.fixture(scope="module")
def worker(omni: OmniApi) -> ChatWorker:
    """That of the server, in a thread of this process."""
    workers = [each for each in gc.get_objects() if type(each) is ChatWorker]
    return next(each for each in workers if isinstance(each._outbox, StageLoop))


@pytest.fixture
def endless(worker: ChatWorker, monkeypatch: pytest.MonkeyPatch) -> ChatWorker:
    """Made to go on until it is told to stop."""
    monkeypatch.setattr(part(worker, "thinker").batch, "_ends", frozenset())
    monkeypatch.setattr(part(worker, "talker").talker, "ends", frozenset())
    return worker


def begun(omni: OmniApi) -> bool:
    return any(job.begun for job in list(omni.client._coordinator._jobs.values()))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_ends_every_stage(
    omni: OmniApi, endless: ChatWorker, stream: bool
) -> None:
    with send(omni, "/v1/chat/completions", {**LONG, **ENDLESS, "stream": stream}) as connection:
        if stream:
            assert b"200 OK" in connection.recv(4096)
        omni.wait_until("begun", lambda: begun(omni))
    omni.wait_until("cancelled", lambda: omni.unfinished() == 0)
    omni.wait_until("let go of", lambda: endless.running() == 0)
    talking = part(endless, "talker")
    assert not talking.batch.rows and talking.talker.kv.slots == []
    assert part(endless, "thinker").thinker.kv.slots == []
    assert omni.chat().status_code == 200


def test_speech_that_nobody_hears_ends(omni: OmniApi, endless: ChatWorker) -> None:
    body = {"input": "a cat on the river " * 40, "stream": True}
    with send(omni, "/v1/audio/speech", body):
        omni.wait_until("begun", lambda: begun(omni))
    omni.wait_until("cancelled", lambda: omni.unfinished() == 0)


@pytest.mark.parametrize("spoken", [False, True], ids=["text", "speech"])
def test_many_streams_with_some_that_leave_do_not_mix(
    omni: OmniApi, worker: ChatWorker, spoken: bool
) -> None:
    texts = ["a cat", "a dog", "the sea", "a bird", "a fox", "the moon"]
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 14, "stream": True}
    if spoken:
        short = {"max_tokens": 4, "talker_temperature": 0, "talker_max_new_tokens": 8}
        body |= {"modalities": ["text", "audio"], **short}

    async def ask(client: httpx.AsyncClient, text: str, leave: int) -> tuple[str, bytes]:
        """What was said; somebody who leaves does so after `leave` pieces."""
        said, sound, pieces = "", b"", 0
        asked = {**body, "messages": [{"role": "user", "content": text}]}
        async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    said += choice["delta"].get("content", "")
                    audio = choice["delta"].get("audio", {})
                    sound += base64.b64decode(audio.get("data", ""))
                    pieces += 1
                if 0 < leave <= pieces:
                    return "", b""
        return said, sound

    async def story(asked: list[tuple[str, int]]) -> list[tuple[str, bytes]]:
        async with httpx.AsyncClient(base_url=omni.url, timeout=300) as client:
            return list(await asyncio.gather(*(ask(client, *each) for each in asked)))

    alone = {text: asyncio.run(story([(text, 0)]))[0] for text in texts}
    chance = random.Random(7)
    leaves = [chance.randint(1, 5) if i % 3 == 2 else 0 for i in range(16)]
    found = asyncio.run(story([(texts[i % 6], leave) for i, leave in enumerate(leaves)]))
    for i, (said, sound) in enumerate(found):
        if leaves[i]:
            continue
        expected, heard = alone[texts[i % 6]]
        assert said == expected and len(sound) == len(heard) and bool(heard) == spoken
        samples = [np.frombuffer(data, "<i2").astype(int) for data in (sound, heard)]
        np.testing.assert_allclose(*samples, atol=3)
    omni.wait_until("all over", lambda: omni.unfinished() == worker.running() == 0)
    assert all(each.running() == 0 for each in worker.parts.values())
    assert part(worker, "thinker").thinker.kv.slots == part(worker, "talker").talker.kv.slots == []
    assert part(worker, "talker")._of == {}

    def most_rows() -> int:
        lines = omni.http.get("/metrics").text.splitlines()
        steps = [line for line in lines if line.startswith("sgld_decode_steps_total")]
        return max(
            (int(line.partition('rows="')[2].partition('"')[0]) for line in steps), default=0
        )

    omni.wait_until("the streams shared steps, as the stage soon tells", lambda: most_rows() > 4)


def test_a_full_server_says_when_to_come_back(tiny_qwen3_omni: Path, tmp_path: Path) -> None:
    api = OmniApi(tiny_qwen3_omni, tmp_path, max_queue=1, speech=False)
    try:
        with send(api, "/v1/chat/completions", {**LONG, "n": 16, "max_tokens": 4000}):
            api.wait_until("taken", lambda: api.unfinished() == 1)
            answer = api.chat()
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        api.wait_until("over", lambda: api.unfinished() == 0)
        silent = api.chat(modalities=["text", "audio"])
        assert silent.json()["error"]["code"] == "unsupported_parameter"
        assert api.http.get("/v1/models").json()["data"][0]["output_modalities"] == ["text"]
        assert api.http.get("/v1/audio/voices").json()["voices"] == []
        api.context.draining = True
        assert api.http.get("/health").status_code == api.chat().status_code == 503
    finally:
        api.close()


def test_health_follows_the_worker(omni: OmniApi, monkeypatch: pytest.MonkeyPatch) -> None:
    assert omni.http.get("/health").json() == {"status": "healthy", "running": True, "restarts": 0}
    dead = Health("restarting", "the worker died", 1, 0.5)
    monkeypatch.setattr(omni.client, "health", lambda: dead)
    answer = omni.http.get("/health")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    body = answer.json()
    assert (body["status"], body["running"], body["reason"]) == (
        "unhealthy", False, "the worker died",
    )  # fmt: skip


def test_what_breaks_inside_leaks_nothing(omni: OmniApi, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(omni.client, "submit", broken)
    answer = omni.chat()
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


@pytest.fixture
def broken_fox(worker: ChatWorker) -> Iterator[None]:
    """In the loaded weights the word is no numbers."""
    thinker = part(worker, "thinker")
    (token,) = thinker._tokenizer.encode(" fox")
    weight = thinker.model.get_input_embeddings().weight
    before = weight[token].clone()
    weight[token] = float("nan")
    yield
    weight[token] = before


def test_an_answer_whose_numbers_break_fails_and_the_others_go_on(
    omni: OmniApi, broken_fox: None
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("the sea", {"max_tokens": 40}),
        ("a red fox", {}),
        ("a cat", {"stream": True, "max_tokens": 40}),
        ("a small fox", {"stream": True, "modalities": ["text", "audio"]}),
        ("a dog", {"modalities": ["text", "audio"], "talker_max_new_tokens": 8}),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: omni.chat(each[0], **each[1]), asked))
    assert [answer.status_code for answer in answers] == [200, 500, 200, 500, 200]
    for broken in (answers[1], answers[3]):
        error = broken.json()["error"]
        assert error["code"] == "numbers_broken" and "no finite numbers" in error["message"]
    assert len(chunks_of(answers[2])) > 10
    for text in ("the sea", "a dog"):
        assert answers[[each[0] for each in asked].index(text)].json()["choices"]
    spoken = {"input": "a fox", "stream_format": "sse"}
    answer = omni.http.post("/v1/audio/speech", json=spoken)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "numbers_broken"
    omni.wait_until("all over", lambda: omni.unfinished() == 0)
    assert omni.http.get("/health").json()["restarts"] == 0


def test_an_error_after_the_first_byte_is_an_event(
    omni: OmniApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sgl_diffusion.client.chat import ChatHandle

    whole = ChatHandle.pieces

    async def breaks(self: ChatHandle) -> Any:
        async for piece in whole(self):
            yield piece
            raise EngineError("The worker met an internal error.")

    monkeypatch.setattr(ChatHandle, "pieces", breaks)
    text = omni.chat(stream=True).text
    assert text.count("data: ") == 3 and "[DONE]" not in text
    assert "event: error\n" in text and '"code": "engine_error"' in text
    omni.wait_until("cancelled", lambda: omni.unfinished() == 0)
