"""Encoding files keeps nobody waiting: not the next job, not a picture, not a poll."""

from __future__ import annotations

import os
import threading
import time

import pytest

from sgl_diffusion.server import outputs
from sgl_diffusion.server.pools import video_pool

PATH = "/v1/videos"


@pytest.fixture
def slow_files(monkeypatch):
    """Encoding begins, and goes on until the test lets it; the times are noted."""
    go, began, encode = threading.Event(), threading.Event(), outputs.encode_video
    spans: list[tuple[float, float]] = []

    def slow(*args, **options):
        start = time.monotonic()
        began.set()
        assert go.wait(20)
        encode(*args, **options)
        spans.append((start, time.monotonic()))

    monkeypatch.setattr(outputs, "encode_video", slow)
    slow.go, slow.began, slow.spans = go, began, spans  # type: ignore[attr-defined]
    yield slow
    go.set()


def test_the_next_job_runs_while_files_are_encoded(api, slow_files):
    api.client.step_seconds = 0.02
    first = [api.post(PATH, json={"prompt": "x"}).json()["id"] for _ in range(3)]
    assert slow_files.began.wait(10)
    started = time.monotonic()
    second = api.post(PATH, json={"prompt": "y", "num_inference_steps": 10}).json()["id"]
    stamps = {}
    while len(stamps) < 8:
        video = api.get(f"{PATH}/{second}").json()
        if video["status"] == "in_progress":
            stamps.setdefault(video["progress"], time.monotonic())
        assert time.monotonic() - started < 10, stamps
        time.sleep(0.005)
    slow_files.go.set()
    for video_id in (*first, second):
        api.wait_for(video_id, "completed")
    begin, end = slow_files.spans[0]
    assert all(begin < stamp < end for stamp in stamps.values())


def test_pictures_do_not_wait_for_videos(api, slow_files):
    """More videos than there are threads; a picture has threads of its own."""
    videos = [api.post(PATH, json={"prompt": "x"}).json()["id"] for _ in range(6)]
    assert slow_files.began.wait(10)
    started = time.monotonic()
    for _ in range(3):
        answer = api.post("/v1/images/generations", json={"prompt": "x"})
        assert answer.status_code == 200
    assert api.get("/health_generate").status_code == 200
    assert time.monotonic() - started < 5 and not slow_files.spans
    slow_files.go.set()
    for video_id in videos:
        api.wait_for(video_id, "completed")


def test_a_video_that_is_being_encoded_is_almost_done(api, slow_files):
    video = api.post(PATH, json={"prompt": "x"}).json()["id"]
    assert slow_files.began.wait(10)
    state = api.get(f"{PATH}/{video}").json()
    assert (state["status"], state["progress"]) == ("in_progress", 99)


def test_the_threads_of_videos_give_way():
    """They and those that they start: x264 has its own."""
    found = []

    def niceness() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def both() -> None:
        niceness()
        child = threading.Thread(target=niceness)
        child.start()
        child.join()

    with video_pool() as pool:
        pool.submit(both).result()
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert found == [min(here + 10, 19)] * 2
