"""The histograms of a real server: every request is in them once, as the page says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from tests.e2e.server import Server
from tests.exposition import Scrape

GENERATE = "/v1/images/generations"
SMALL = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 4}
KINDS = ("image", "edit", "video")


def scrape(server: Server) -> Scrape:
    return Scrape(server.http.get("/metrics").text)


def counts(server: Server, name: str, **labels: str) -> dict[str, float]:
    read = scrape(server)
    found = {kind: read.count(f"sgld_{name}", kind=kind, **labels) for kind in KINDS}
    return {kind: count for kind, count in found.items() if count}


def ends(server: Server) -> float:
    return sum(v for name, v in server.metrics().items() if name.startswith("sgld_job_total"))


@contextmanager
def streaming(server: Server, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
    wanted = {**SMALL, "stream": True, "partial_images": 1, **body}
    with server.http.stream("POST", GENERATE, json=wanted) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        yield (json.loads(line.removeprefix("data: ")) for line in lines if line[:5] == "data:")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (10, 90, 200)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_every_request_is_counted_once(server: Server) -> None:
    for seed in range(3):
        answer = server.http.post(GENERATE, json={**SMALL, "seed": seed, "n": 2})
        assert answer.status_code == 200, answer.text
    with streaming(server) as events:
        kinds = [event["type"] for event in events]
    assert kinds == ["image_generation.partial_image", "image_generation.completed"]
    edited = server.http.post(
        "/v1/images/edits",
        data={"prompt": "a star", "size": "64x64", "num_inference_steps": "4"},
        files={"image": ("in.png", picture(), "image/png")},
    )
    assert edited.status_code == 200, edited.text
    made = [server.video(num_frames=5, num_inference_steps=2) for _ in range(2)]
    assert [server.finished(each)["status"] for each in made] == ["completed"] * 2
    # Turned away: it is in none of them.
    assert server.http.post(GENERATE, json={"prompt": ""}).status_code == 400

    whole = {"image": 4.0, "edit": 1.0, "video": 2.0}
    server.wait_until("told", lambda: counts(server, "request_seconds") == whole)
    assert counts(server, "request_seconds", outcome="completed") == whole
    assert counts(server, "queue_wait_seconds") == counts(server, "job_seconds") == whole
    assert counts(server, "first_output_seconds") == {"image": 1.0}
    assert ends(server) == 7

    read = scrape(server)
    for kind in KINDS:
        waited, took, all_of_it = (
            read.sum(f"sgld_{name}", kind=kind)
            for name in ("queue_wait_seconds", "job_seconds", "request_seconds")
        )
        assert 0 < waited < took < all_of_it
    answer = server.http.get("/stats").json()
    assert not [s for s in answer["samples"] if s["name"].endswith("_bucket")]


def test_who_leaves_is_counted_as_cancelled(server: Server) -> None:
    before, over = scrape(server), ends(server)

    def more(name: str, **labels: str) -> float:
        return scrape(server).count(name, **labels) - before.count(name, **labels)

    with streaming(server, num_inference_steps=200, size="128x128", n=4) as events:
        assert next(events)["type"] == "image_generation.partial_image"
    server.wait_until("gone", lambda: more("sgld_request_seconds", kind="image") == 1)
    video = server.video(num_frames=17, num_inference_steps=200)
    server.wait_until("it runs", lambda: server.state(video)["status"] == "in_progress")
    assert server.http.delete(f"/v1/videos/{video}").json()["deleted"] is True
    server.wait_until("deleted", lambda: more("sgld_request_seconds", kind="video") == 1)
    assert more("sgld_request_seconds", outcome="cancelled") == 2 == ends(server) - over
    assert more("sgld_queue_wait_seconds") == 2 and more("sgld_first_output_seconds") == 1
    assert more("sgld_job_seconds") == 0


def test_what_fails_is_counted_as_failed(start: Callable[..., Server]) -> None:
    """Nobody makes so many steps of that size in the second that a request gets here."""
    server = start("--request-timeout", "1").wait_ready()
    for seed in range(3):
        body = {**SMALL, "size": "512x512", "n": 4, "num_inference_steps": 200, "seed": seed}
        answer = server.http.post(GENERATE, json=body)
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "deadline_exceeded"
    server.wait_until("told", lambda: counts(server, "request_seconds") == {"image": 3.0})
    assert counts(server, "request_seconds", outcome="failed") == {"image": 3.0}
    assert counts(server, "job_seconds") == {}
