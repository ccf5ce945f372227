"""What clients can do to a server: leave, repeat themselves, ask for too much."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.faults.harness import FaultServer, rows


def leave(server: FaultServer, path: str, body: dict[str, object], after: float = 0.0) -> None:
    """Send a request and close the connection, without `after` as soon as its job runs."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if after:
            time.sleep(after)
        else:
            server.wait_until("it runs", lambda: server.sample("jobs_running") == 1)


def idle(server: FaultServer) -> None:
    server.wait_until(
        "nothing runs", lambda: server.sample("jobs_running") + server.sample("jobs_waiting") == 0
    )


def test_a_client_that_leaves_ends_its_image(server: FaultServer) -> None:
    files = sorted((server.data_dir / "images").iterdir())
    body = {"prompt": "@hold:9", "size": "32x32"}
    before = server.sample("cancel_latency_seconds_count")
    server.hold()
    idle(server)
    leave(server, "/v1/images/generations", body)
    idle(server)
    assert sorted((server.data_dir / "images").iterdir()) == files
    server.wait_until("told", lambda: server.sample("cancel_latency_seconds_count") == before + 1)


def test_a_hundred_clients_leave(server: FaultServer) -> None:
    """No descriptor, no task and no thread stays, and nobody else is cut off."""
    server.image()
    idle(server)
    names = ("open_fds", "tasks", "threads")
    before = [server.sample(name) for name in names]
    body = {"prompt": "@slow:0.01", "size": "32x32", "num_inference_steps": 100}
    with ThreadPoolExecutor(8) as pool:
        good = pool.submit(server.image, "@slow:0.005")
        for _ in range(100):
            pool.submit(leave, server, "/v1/images/generations", body, 0.01)
        assert good.result().status_code == 200
    idle(server)

    def settled() -> bool:
        after = [server.sample(name) for name in names]
        return all(now <= then + 1 for now, then in zip(after, before, strict=True))

    server.wait_until("nothing is left", settled)


def test_a_client_leaves_a_stream(server: FaultServer) -> None:
    body = {"prompt": "@hold:9", "size": "32x32", "stream": True}
    server.hold()
    idle(server)
    leave(server, "/v1/images/generations", body)
    idle(server)


def test_delete_in_every_state(server: FaultServer) -> None:
    completed = server.make()
    server.finished(completed)
    server.hold()
    running = server.make("@hold:9")
    server.wait_until("runs", lambda: server.state(running)["status"] == "in_progress")
    for video_id in (completed, running):
        assert server.delete(video_id) == 200
        assert server.delete(video_id) == 404
        assert server.http.get(f"/v1/videos/{video_id}").status_code == 404
        assert not list((server.data_dir / "videos").glob(f"*{video_id}*"))
        assert not (server.data_dir / "jobs" / f"{video_id}.json").exists()
    idle(server)


def test_a_full_queue(server: FaultServer) -> None:
    """429 with a time to return; being refused costs no memory; deleting makes room."""
    server.hold()
    made = [server.make("@hold:9")]
    body = {"prompt": "@hold:9"}
    while (answer := server.http.post("/v1/videos", json=body)).status_code == 200:
        made.append(answer.json()["id"])
        assert len(made) < 200
    assert answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["retry-after"]) <= 110
    before = server.sample("resident_bytes")
    for _ in range(300):
        assert server.http.post("/v1/videos", json={"prompt": "x"}).status_code == 429
    assert server.sample("resident_bytes") - before < 20e6
    assert server.metrics()['sgld_rejected_total{code="queue_full"}'] >= 301
    assert server.sample('queue_depth{kind="video"}') >= 60
    for video_id in made:
        assert server.delete(video_id) == 200
    idle(server)


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
def test_the_sdk_retries_and_makes_one_job(server: FaultServer) -> None:
    """The answers come too late for the client: it sends everything three times."""
    before = set(rows(server.data_dir))
    lost = _Losing(server.url)
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="x", max_retries=2, http_client=lost.client()
    )
    with contextlib.suppress(openai.APIConnectionError):
        client.videos.create(prompt="waves", size="32x32", extra_body={"num_frames": 5})
    assert lost.answers == 3
    (made,) = set(rows(server.data_dir)) - before
    assert server.finished(made)["status"] == "completed"

    kept = set(rows(server.data_dir))
    with contextlib.suppress(openai.APIConnectionError):
        client.images.generate(prompt="a cat", size="32x32", response_format="url")
    assert lost.answers == 6
    assert len(set(rows(server.data_dir)) - kept) == 1
    client.close()


class _Losing(httpx.BaseTransport):
    """Sends every request, waits for the answer, and loses it."""

    def __init__(self, url: str) -> None:
        self.answers = 0
        self._inner = httpx.HTTPTransport()

    def client(self) -> httpx.Client:
        return httpx.Client(transport=self)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._inner.handle_request(request)
        answer.read()
        answer.close()
        self.answers += 1
        raise httpx.ReadError("the answer was lost")

    def close(self) -> None:
        self._inner.close()


def test_one_key_is_one_job(server: FaultServer) -> None:
    """Also when ten come at the same moment; another body under the key is an error."""
    headers = {"idempotency-key": "fault-1"}
    body = {"prompt": "waves", "size": "32x32", "num_frames": 5, "seed": 3}
    with ThreadPoolExecutor(10) as pool:
        send = lambda _: server.http.post("/v1/videos", json=body, headers=headers)  # noqa: E731
        answers = list(pool.map(send, range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = server.http.post("/v1/videos", json={**body, "seed": 4}, headers=headers)
    assert other.status_code == 409 and other.headers["x-should-retry"] == "false"
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert server.http.post("/v1/videos", json=body, headers={"idempotency-key": "k" * 10_000}
                            ).status_code == 400  # fmt: skip
    image = {"prompt": "a cat", "size": "32x32", "response_format": "b64_json"}
    with ThreadPoolExecutor(5) as pool:
        paint = lambda _: server.http.post(  # noqa: E731
            "/v1/images/generations", json=image, headers={"idempotency-key": "fault-2"}
        )
        pictures = [answer.json() for answer in pool.map(paint, range(5))]
    assert all(picture == pictures[0] for picture in pictures)
    assert pictures[0]["data"][0]["b64_json"]


def test_half_sent_requests_do_not_hold_up_others(server: FaultServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        begun = time.monotonic()
        assert server.finished(server.make())["status"] == "completed"
        assert time.monotonic() - begun < 60.0, "it waited for their headers"


def test_a_file_that_is_deleted_by_hand(server: FaultServer) -> None:
    video_id = server.make()
    server.finished(video_id)
    (server.data_dir / "videos" / f"{video_id}.mp4").unlink()
    lost = server.http.get(f"/v1/videos/{video_id}/content")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "video_expired")
    assert server.http.get("/v1/videos").status_code == 200
    assert server.delete(video_id) == 200


@contextlib.contextmanager
def limited(server: FaultServer, what: int, limit: int) -> Iterator[None]:
    before = resource.prlimit(server.process.pid, what)
    resource.prlimit(server.process.pid, what, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.process.pid, what, before)


def test_a_disk_that_takes_no_files(server: FaultServer) -> None:
    """No ghost of a job whose row cannot be written, no half file; then all is well again."""
    before = set(rows(server.data_dir))
    video_id = server.make("@slow:0.03")
    with limited(server, resource.RLIMIT_FSIZE, 512):
        refused = server.http.post("/v1/videos", json={"prompt": "x" * 2000})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "insufficient_storage"
        assert refused.headers["x-should-retry"] == "false"
        picture = server.image()
        assert picture.status_code == 503, picture.text
        server.wait_until("it ran", lambda: server.sample("jobs_running") == 0)
    assert set(rows(server.data_dir)) == before | {video_id}
    assert not list(server.data_dir.rglob("*.part"))
    server.delete(video_id)


def test_no_descriptors_left(server: FaultServer) -> None:
    """New connections wait or fail; those that are open are served; later all is well."""
    open_now = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    with limited(server, resource.RLIMIT_NOFILE, open_now + 1):
        connections = []
        for _ in range(5):
            connections.append(socket.create_connection(("127.0.0.1", server.port), timeout=1))
        time.sleep(0.3)
        for connection in connections:
            connection.close()
    server.wait_until("answers", lambda: server.http.get("/livez").status_code == 200)
