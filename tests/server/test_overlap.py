"""Encoding files keeps nobody waiting: not the next job, not a picture, not a poll."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from sgl_diffusion.server import outputs
from sgl_diffusion.server.pools import video_pool

PATH = "/v1/videos"


@pytest.fixture
def slow_files(monkeypatch):
    """Encoding begins, and goes on only when the test lets it."""
    go, began, encode = threading.Event(), threading.Event(), outputs.encode_video

    def slow(*args, **options):
        began.set()
        assert go.wait(100)
        encode(*args, **options)

    monkeypatch.setattr(outputs, "encode_video", slow)
    slow.go, slow.began = go, began  # type: ignore[attr-defined]
    yield slow
    go.set()


def test_the_next_job_runs_while_files_are_encoded(api, slow_files):
    first = [api.post(PATH, json={"prompt": "x"}).json()["id"] for _ in range(3)]
    assert slow_files.began.wait(60)
    for video_id in first:
        api.until(lambda path=f"{PATH}/{video_id}": api.get(path).json()["progress"] == 99)
    api.client.turns = asyncio.Semaphore(0)
    second = api.post(PATH, json={"prompt": "y", "num_inference_steps": 10}).json()["id"]
    for step in range(1, 11):
        api.call(api.client.turns.release)
        percent = min(10 * step, 99)
        api.until(lambda percent=percent: api.get(f"{PATH}/{second}").json()["progress"] == percent)
    for video_id in (*first, second):
        assert api.get(f"{PATH}/{video_id}").json()["status"] == "in_progress"
    slow_files.go.set()
    for video_id in (*first, second):
        api.wait_for(video_id, "completed")


def test_pictures_do_not_wait_for_videos(api, slow_files):
    """More videos than there are threads; a picture has threads of its own."""
    videos = [api.post(PATH, json={"prompt": "x"}).json()["id"] for _ in range(6)]
    assert slow_files.began.wait(60)
    for _ in range(3):
        answer = api.post("/v1/images/generations", json={"prompt": "x"})
        assert answer.status_code == 200
    assert api.get("/health_generate").status_code == 200
    assert {video["status"] for video in api.get(PATH).json()["data"]} == {"in_progress"}
    slow_files.go.set()
    for video_id in videos:
        api.wait_for(video_id, "completed")


def test_a_video_that_is_being_encoded_is_almost_done(api, slow_files):
    video = api.post(PATH, json={"prompt": "x"}).json()["id"]
    assert slow_files.began.wait(60)
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
