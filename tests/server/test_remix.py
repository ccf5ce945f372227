"""Several outputs in one job, remixes, and the progress stream."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time

import httpx
import pytest
from PIL import Image

from sgl_diffusion.base import errors

PATH = "/v1/videos"


def finished(api, **body):
    video = api.post(PATH, json={"prompt": "a wave", **body}).json()
    return api.wait_for(video["id"], "completed", "failed")


@pytest.mark.parametrize("name", ["n", "num_outputs_per_prompt"])
def test_several_outputs(api, name):
    video = finished(api, **{name: 3}, seed=5, num_frames=5)
    assert video["num_outputs"] == 3 and len(video["urls"]) == 3
    assert video["url"] == video["urls"][0]
    contents = [api.get(url).content for url in video["urls"]]
    assert len(set(contents)) == 3
    thumbnails = [
        api.get(f"{PATH}/{video['id']}/content?variant=thumbnail&index={index}").content
        for index in range(3)
    ]
    assert len(set(thumbnails)) == 3
    assert api.get(f"{PATH}/{video['id']}/content?index=3").status_code == 404
    assert api.client.submitted[-1].seeds == (5, 6, 7)
    assert len(list((api.folder / "videos").iterdir())) == 9
    api.request("DELETE", f"{PATH}/{video['id']}")
    assert not list((api.folder / "videos").iterdir())


def test_two_names_of_one_number(api):
    both = {"prompt": "x", "n": 2, "num_outputs_per_prompt": 3}
    answer = api.post(PATH, json=both)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "conflicting_parameters"
    assert api.post(PATH, json={**both, "n": 3}).json()["num_outputs"] == 3


def test_a_remix_has_the_settings_of_its_source(api):
    source = finished(
        api, seed=[8, 3], n=2, num_frames=5, fps=8, size="32x48", guidance_scale=2.0,
        negative_prompt="dull", output_quality="low", x264_preset="veryfast",
    )  # fmt: skip
    answer = api.post(f"{PATH}/{source['id']}/remix", json={"prompt": "a storm"})
    assert answer.status_code == 200, answer.text
    remix = answer.json()
    assert remix["id"] != source["id"] and remix["remixed_from_video_id"] == source["id"]
    assert remix["prompt"] == "a storm" and source["remixed_from_video_id"] is None
    assert api.wait_for(remix["id"], "completed")["remixed_from_video_id"] == source["id"]
    before, after = api.client.submitted[-2:]
    assert after.prompt == "a storm" and before.prompt == "a wave"
    for name in (
        "seeds", "num_frames", "fps", "width", "height", "guidance_scale", "negative_prompt",
        "num_inference_steps",
    ):  # fmt: skip
        assert getattr(before, name) == getattr(after, name), name
    rows = [api.run(api.jobs.get(video["id"])) for video in (source, remix)]
    assert [(row.payload["quality"], row.payload["preset"]) for row in rows] == [
        (35, "veryfast")
    ] * 2


def test_a_remix_outlives_its_source(api):
    source = finished(api)
    remix = api.post(f"{PATH}/{source['id']}/remix", json={"prompt": "y"}).json()
    api.request("DELETE", f"{PATH}/{source['id']}")
    assert api.wait_for(remix["id"], "completed")["remixed_from_video_id"] == source["id"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"prompt": " "}, 400, "prompt_empty"),
        ({}, 400, "missing_parameter"),
        ({"prompt": "x", "seed": 3}, 400, "unknown_parameter"),
        ({"prompt": 3}, 400, "invalid_type"),
    ],
)
def test_wrong_remixes(api, body, status, code):
    source = finished(api, num_frames=1)
    answer = api.post(f"{PATH}/{source['id']}/remix", json=body)
    assert answer.status_code == status and answer.json()["error"]["code"] == code


def test_only_a_completed_video_can_be_remixed(api):
    unknown = api.post(f"{PATH}/video_0123456789/remix", json={"prompt": "x"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "video_not_found"
    api.client.fail_with = errors.EngineError("Broken.")
    failed = finished(api)
    api.client.gate.clear()
    waiting = api.post(PATH, json={"prompt": "x"}).json()
    for video in (failed, waiting):
        answer = api.post(f"{PATH}/{video['id']}/remix", json={"prompt": "x"})
        assert answer.status_code == 409 and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "video_not_completed"


@pytest.mark.parametrize("name", ["edits", "extensions", "characters"])
def test_what_is_not_supported(api, name):
    answer = api.post(f"{PATH}/{name}", json={"prompt": "x"})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_supported"


def test_eta(api):
    """Unknown before a video was made; then the further back, the later."""
    first = api.post(PATH, json={"prompt": "x", "num_inference_steps": 4}).json()
    assert first["eta_s"] is None
    api.client.step_seconds = 0.6
    finished(api, num_inference_steps=4)  # takes 2.4 seconds
    api.client.gate.clear()
    waiting = [api.post(PATH, json={"prompt": "x"}).json() for _ in range(3)]
    etas = [video["eta_s"] for video in waiting]
    assert etas == sorted(etas) and 0 < etas[0] < etas[2] <= 3 * etas[0]


class Stream:
    """The events of a video, read from a socket by a thread."""

    def __init__(self, base_url: str, video_id: str) -> None:
        self.events: list[tuple[str, dict]] = []
        self.comments = 0
        self._url = f"{base_url}{PATH}/{video_id}/events"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("GET", self._url, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            kind = ""
            for line in answer.iter_lines():
                self.comments += line.startswith(":")
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self.events.append((kind, json.loads(line.removeprefix("data: "))))

    def wait_for(self, kind: str) -> dict:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for seen, data in list(self.events):
                if seen == kind:
                    return data
            time.sleep(0.01)
        raise AssertionError(f"no {kind} in {[seen for seen, _ in self.events]}")

    def end(self) -> list[tuple[str, dict]]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.events


def test_events_from_the_queue_to_the_end(api, base_url):
    api.client.gate.clear()
    first, second = (
        api.post(PATH, json={"prompt": "x", "num_inference_steps": 6}).json() for _ in range(2)
    )
    stream = Stream(base_url, second["id"])
    assert stream.wait_for("video.queued")["video"]["queue_position"] == 1
    api.request("DELETE", f"{PATH}/{first['id']}")
    api.until(lambda: stream.events[-1][1]["video"]["queue_position"] == 0)
    api.client.turns = asyncio.Semaphore(0)
    api.call(api.client.gate.set)
    for step in range(1, 6):
        api.call(api.client.turns.release)
        api.until(lambda step=step: stream.events[-1][1]["video"]["progress"] == 100 * step // 6)
    api.call(api.client.turns.release)
    events = stream.end()
    kinds = [kind for kind, _ in events]
    assert kinds == sorted(
        kinds, key=["video.queued", "video.in_progress", "video.completed"].index
    )
    assert all(data["type"] == kind for kind, data in events)
    assert [data["video"].get("queue_position") for _, data in events][:2] == [1, 0]
    progress = [data["video"]["progress"] for _, data in events]
    assert progress == sorted(progress) and progress[-1] == 100
    assert events[-1][1]["video"] == api.get(f"{PATH}/{second['id']}").json()


def test_events_of_a_failure_and_of_what_is_over(api, base_url):
    api.client.fail_with = errors.WorkerLostError("It died.")
    video = finished(api)
    ((kind, data),) = Stream(base_url, video["id"]).end()
    assert kind == "video.failed" and data["video"]["error"]["code"] == "worker_lost"


def test_events_of_a_deleted_video_and_of_a_stopping_server(api, base_url):
    api.client.gate.clear()
    deleted, waiting = (api.post(PATH, json={"prompt": "x"}).json()["id"] for _ in range(2))
    streams = [Stream(base_url, video_id) for video_id in (deleted, waiting)]
    for stream in streams:
        stream.wait_for("video.queued")
    api.request("DELETE", f"{PATH}/{deleted}")
    assert streams[0].end()[-1][1]["error"]["code"] == "video_not_found"
    api.context.draining = True
    kind, data = streams[1].end()[-1]
    assert kind == "error" and data["error"]["code"] == "draining"


def test_an_idle_stream_is_kept_alive(api, base_url, monkeypatch):
    monkeypatch.setattr("sgl_diffusion.server.events.PING_SECONDS", 0.2)
    api.client.gate.clear()
    video = api.post(PATH, json={"prompt": "x"}).json()
    stream = Stream(base_url, video["id"])
    stream.wait_for("video.queued")
    api.until(lambda: stream.comments >= 2)
    api.call(api.client.gate.set)
    assert stream.end()[-1][0] == "video.completed"


def test_events_of_an_unknown_video(api):
    assert api.get(f"{PATH}/video_0123456789/events").status_code == 404


def test_the_newest_preview_of_a_video_that_is_made(api):
    api.client.turns = asyncio.Semaphore(0)
    body = {"prompt": "x", "partial_images": 2, "num_inference_steps": 200}
    path = f"{PATH}/{api.post(PATH, json=body).json()['id']}"
    missing = api.get(f"{path}/preview")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "variant_not_available"
    for _ in range(3):
        api.call(api.client.turns.release)
    api.until(lambda: str(api.get(path).json()["preview_url"]).endswith("?step=2"))
    video = api.get(path).json()
    assert video["status"] == "in_progress"
    shown = api.get(video["preview_url"])
    assert shown.headers["content-type"] == "image/jpeg"
    assert shown.headers["cache-control"] == "no-store"
    with Image.open(io.BytesIO(shown.content)) as picture:
        assert picture.size == (64, 48)
    assert api.request("HEAD", f"{path}/preview").status_code == 200
    assert api.get(f"{path}/preview?step=a").status_code == 400
    api.request("DELETE", path)
    assert api.get(f"{path}/preview").json()["error"]["code"] == "video_not_found"


def test_a_finished_video_has_a_thumbnail_instead(api):
    done = api.post(PATH, json={"prompt": "x", "partial_images": 1}).json()
    api.wait_for(done["id"], "completed")
    answer = api.get(f"{PATH}/{done['id']}/preview")
    assert answer.status_code == 404 and "variant=thumbnail" in answer.json()["detail"]
