"""The video routes, in process, with the real job table."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import json
import time
import weakref

import av
import pytest

from sgl_diffusion.base import errors
from sgl_diffusion.base.config import JobOptions

PATH = "/v1/videos"


def multipart(**fields):
    return {"files": [(name, (None, str(value))) for name, value in fields.items()]}


def finished(api, **body):
    video = api.post(PATH, json={"prompt": "a wave", **body}).json()
    return api.wait_for(video["id"], "completed", "failed")


def test_life_of_a_video(api):
    api.client.gate.clear()
    answer = api.post(PATH, json={"prompt": "a wave"})
    assert answer.status_code == 200
    assert answer.headers["openai-poll-after-ms"] == "500"
    video = answer.json()
    assert video["id"].startswith("video_") and video["object"] == "video"
    assert video["status"] == "queued" and video["progress"] == 0
    assert video["prompt"] == "a wave" and video["model"] == "tiny"
    assert video["seconds"] == "1" and video["size"] == "64x48"
    assert (video["fps"], video["num_frames"], video["seed"]) == (16, 17, 42)
    assert video["completed_at"] is None and video["error"] is None
    early = api.get(f"{PATH}/{video['id']}/content")
    assert early.status_code == 409 and early.headers["x-should-retry"] == "false"
    assert early.json()["error"]["code"] == "video_not_ready"

    api.call(api.client.gate.set)
    done = api.wait_for(video["id"], "completed")
    assert done["progress"] == 100 and isinstance(done["completed_at"], int)
    assert done["peak_memory_mb"] == 0.0
    assert done["inference_time_s"] == 0.75 and done["url"].endswith("/content")
    file = api.get(done["url"])
    assert file.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(file.content)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 48, 16)
        assert sum(1 for _ in container.decode(stream)) == 17


def test_a_finished_job_is_not_held(api):
    """Its frames are shared memory of hundreds of megabytes."""
    video = api.post(PATH, json={"prompt": "x"}).json()
    handle = api.call(lambda: weakref.ref(api.client.handles.pop(video["id"])))
    api.wait_for(video["id"], "completed")
    api.until(lambda: not api.context.runner.live)  # the row is written a little earlier
    assert api.call(lambda: (gc.collect(), handle())[1]) is None


def test_progress_is_seen_while_it_runs(api):
    api.client.turns = asyncio.Semaphore(0)
    path = f"{PATH}/{api.post(PATH, json={'prompt': 'x', 'num_inference_steps': 10}).json()['id']}"
    assert api.get(path).json()["progress"] == 0
    for step in range(1, 10):
        api.call(api.client.turns.release)
        api.until(lambda step=step: api.get(path).json()["progress"] == 10 * step)
        assert api.get(path).json()["status"] == "in_progress"
    api.call(api.client.turns.release)
    api.until(lambda: api.get(path).json()["status"] == "completed")
    assert api.get(path).json()["progress"] == 100


def test_the_row_is_committed_before_the_answer(api):
    api.client.gate.clear()
    video = api.post(PATH, json={"prompt": "x"}).json()
    row = api.run(api.jobs.get(video["id"]))
    assert row is not None and row.payload["params"]["prompt"] == "x"


def test_multipart_as_the_sdk_sends_it(api):
    fields = {
        "prompt": "ein Fluß", "seconds": "2", "size": "32x48", "fps": "8", "seed": "5",
        "num_inference_steps": "2", "guidance_scale": "1.5", "enable_teacache": "false",
        "cfg_gate_step": "0.5", "priority": "9",
    }  # fmt: skip
    answer = api.post(PATH, **multipart(**fields))
    assert answer.status_code == 200, answer.text
    params = api.client.submitted[-1] if api.client.submitted else None
    video = api.wait_for(answer.json()["id"], "completed")
    params = api.client.submitted[-1]
    assert params.prompt == "ein Fluß" and (params.width, params.height) == (32, 48)
    assert (params.fps, params.num_frames, params.seeds) == (8, 17, (5,))
    assert params.num_inference_steps == 2 and params.guidance_scale == 1.5
    assert params.cfg_gate_step == 0.5 and params.priority == 9
    assert video["seconds"] == "2"


def test_multipart_lists_and_nested_extras(api):
    files = [
        ("prompt", (None, "x")),
        ("seed[]", (None, "11")),
        ("extra_body", (None, '{"fps": 8}')),
        ("extra_args[num_frames]", (None, "5")),
    ]
    video = api.post(PATH, files=files).json()
    assert (video["seed"], video["fps"], video["num_frames"]) == (11, 8, 5)


def test_whole_numbers_with_a_fraction_of_zero(api):
    """JSON and its schemas know one kind of number, and some clients write all as 2.0."""
    fields = {"prompt": "x", "seed": [11.0], "fps": 8.0, "num_frames": 5.0, "n": 1.0}
    forms = {"prompt": "x", "seed": "11.0", "fps": "8.", "num_frames": "5e0", "n": "1.0"}
    for sent in ({"json": fields}, multipart(**forms)):
        video = api.post(PATH, **sent).json()
        assert (video["seed"], video["fps"], video["num_frames"]) == (11, 8, 5), video


@pytest.mark.parametrize(
    ("body", "frames", "fps"),
    [
        ({}, 17, 16),
        ({"seconds": "4"}, 65, 16),
        ({"seconds": 4}, 65, 16),
        ({"seconds": 4.0, "fps": 8.0}, 33, 8),
        ({"seconds": "4", "fps": 8}, 33, 8),
        ({"fps": 24}, 17, 24),
        ({"num_frames": 24}, 25, 16),
        ({"num_frames": 81, "seconds": "5"}, 81, 16),
        ({"num_frames": 1}, 1, 16),
    ],
)
def test_length(api, body, frames, fps):
    video = api.post(PATH, json={"prompt": "x", **body}).json()
    assert (video["num_frames"], video["fps"]) == (frames, fps)


def test_list_pages(api):
    made = [api.post(PATH, json={"prompt": str(i)}).json()["id"] for i in range(5)]
    newest = api.get(PATH, params={"limit": 2}).json()
    assert newest["object"] == "list" and newest["has_more"] is True
    assert [video["id"] for video in newest["data"]] == made[:2:-1]
    assert (newest["first_id"], newest["last_id"]) == (made[4], made[3])
    rest = api.get(PATH, params={"after": newest["last_id"]}).json()
    assert [video["id"] for video in rest["data"]] == made[2::-1] and rest["has_more"] is False
    oldest = api.get(PATH, params={"order": "asc", "limit": 5}).json()
    assert [video["id"] for video in oldest["data"]] == made and oldest["has_more"] is False


def test_empty_list(api):
    assert api.get(PATH).json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ("limit=0", "limit", "out_of_range"),
        ("limit=-1", "limit", "out_of_range"),
        ("limit=101", "limit", "out_of_range"),
        ("limit=abc", "limit", "out_of_range"),
        ("limit=100000000000000000000", "limit", "out_of_range"),
        ("limit=%D9%A1", "limit", "out_of_range"),
        ("order=sideways", "order", "invalid_value"),
        ("after=unknown", "after", "invalid_cursor"),
        ("after=video_0123456789", "after", "invalid_cursor"),
    ],
)
def test_bad_queries(api, query, param, code):
    answer = api.get(f"{PATH}?{query}")
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize("name", ["video_0123456789", "image_0123456789", "x", "a%00b", "%ff%fe"])
@pytest.mark.parametrize("tail", ["", "/content"])
def test_unknown_video(api, name, tail):
    answer = api.get(f"{PATH}/{name}{tail}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "video_not_found"
    assert answer.json()["error"]["type"] == "not_found_error"


def test_path_tricks(api):
    for name in ("..%2f..%2fetc%2fpasswd", "..%2F..", "a%2Fb/content"):
        answer = api.get(f"{PATH}/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    assert api.get(f"{PATH}/a/b").json()["error"]["code"] == "not_found"
    assert api.get(f"{PATH}/" + "v" * 60_000).status_code == 404


def test_delete_completed(api):
    video = finished(api)
    path = api.folder / "videos" / f"{video['id']}.mp4"
    assert path.is_file()
    answer = api.request("DELETE", f"{PATH}/{video['id']}")
    assert answer.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert not path.exists()
    assert api.request("DELETE", f"{PATH}/{video['id']}").status_code == 404
    assert api.get(PATH).json()["data"] == []


def test_delete_running_frees_the_worker(api):
    api.client.turns = asyncio.Semaphore(1)
    video = api.post(PATH, json={"prompt": "x", "num_inference_steps": 50}).json()
    api.wait_for(video["id"], "in_progress")
    assert api.request("DELETE", f"{PATH}/{video['id']}").status_code == 200
    assert api.client.cancelled == [video["id"]]
    assert api.get(f"{PATH}/{video['id']}").status_code == 404
    api.until(lambda: not api.context.runner.live)
    assert not list((api.folder / "videos").iterdir())


def test_failed_video(api):
    api.client.fail_with = errors.OutOfMemoryError("It needs 9 GB.", hint="Make it smaller.")
    video = finished(api)
    assert video["status"] == "failed"
    assert video["error"] == {"code": "out_of_memory", "message": "It needs 9 GB. Make it smaller."}
    content = api.get(f"{PATH}/{video['id']}/content")
    assert content.status_code == 409 and content.headers["x-should-retry"] == "false"
    assert content.json()["error"]["code"] == "video_failed"


def test_a_foreign_failure_tells_nothing(api):
    api.client.fail_with = RuntimeError("secret")
    assert finished(api)["error"]["code"] == "internal_error"
    assert "secret" not in api.get(PATH).text


def test_lost_file_is_expired(api):
    video = finished(api)
    (api.folder / "videos" / f"{video['id']}.mp4").unlink()
    answer = api.get(f"{PATH}/{video['id']}/content")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "video_expired"
    assert api.get(PATH).status_code == 200


def test_content_head_range_variant(api):
    url = finished(api)["url"]
    whole = api.get(url).content
    head = api.request("HEAD", url)
    assert head.headers["content-length"] == str(len(whole)) and not head.content
    part = api.get(url, headers={"range": "bytes=-10"})
    assert part.status_code == 206 and part.content == whole[-10:]
    past = api.get(url, headers={"range": f"bytes={len(whole)}-"})
    assert past.status_code == 416
    assert api.get(url + "?variant=exe").status_code == 400
    for query in ("?index=1", "?index=1&variant=thumbnail"):
        answer = api.get(url + query)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "variant_not_available"
    assert api.get(url + "?index=-1").status_code == 400


def test_full_queue(make_api):
    api = make_api(jobs=JobOptions(max_queued_videos=2))
    api.client.gate.clear()
    for _ in range(2):
        assert api.post(PATH, json={"prompt": "x"}).status_code == 200
    refused = api.post(PATH, json={"prompt": "x"})
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    assert 1 <= int(refused.headers["retry-after"]) <= 110
    assert len(api.get(PATH).json()["data"]) == 2


def test_queue_position(api):
    api.client.gate.clear()
    made = [api.post(PATH, json={"prompt": "x"}).json()["id"] for _ in range(3)]
    assert [api.get(f"{PATH}/{i}").json()["queue_position"] for i in made] == [0, 1, 2]


def test_a_busy_client_is_asked_again(api):
    api.client.refuse_with = errors.BusyError("Full.")
    video = api.post(PATH, json={"prompt": "x"}).json()
    time.sleep(0.2)
    assert api.get(f"{PATH}/{video['id']}").json()["status"] == "queued"
    api.client.refuse_with = None
    assert api.wait_for(video["id"], "completed")


def test_without_a_worker_a_video_waits(api):
    api.client.gate.clear()
    api.client.fail_with = errors.UnavailableError("No worker is ready.")
    video = api.post(PATH, json={"prompt": "x"}).json()
    api.call(api.client.gate.set)
    time.sleep(0.2)
    assert api.get(f"{PATH}/{video['id']}").json()["status"] in ("queued", "in_progress")
    api.client.fail_with = None
    assert api.wait_for(video["id"], "completed", "failed")["status"] == "completed"


def test_a_full_disk_fails_the_video(api, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("sgl_diffusion.server.outputs.encode_video", full)
    assert finished(api)["error"]["code"] == "insufficient_storage"
    assert not list((api.folder / "videos").iterdir())


def test_a_table_that_cannot_be_written_ends_the_job_in_the_worker(api, monkeypatch):
    """Its row keeps its state, but nothing goes on computing for it."""
    api.client.turns = asyncio.Semaphore(0)

    async def full(*_args, **_options):
        raise errors.UnavailableError("Full.", code="insufficient_storage")

    monkeypatch.setattr(api.jobs, "update", full)
    video = api.post(PATH, json={"prompt": "x", "num_inference_steps": 50}).json()
    api.until(lambda: api.client.cancelled)
    assert api.client.cancelled == [video["id"]]


def test_a_new_server_goes_on_with_the_rows(make_api):
    first = make_api()
    first.client.turns = asyncio.Semaphore(0)
    running = first.post(PATH, json={"prompt": "one", "seed": 3}).json()["id"]
    first.wait_for(running, "in_progress")
    first.client.gate.clear()
    waiting = first.post(PATH, json={"prompt": "two", "seed": 4}).json()["id"]
    first.call(first.context.runner.stop_taking)
    first.close()

    second = make_api()
    for video_id, seed in ((running, 3), (waiting, 4)):
        video = second.wait_for(video_id, "completed")
        assert video["seed"] == seed
    assert [params.prompt for params in second.client.submitted] == ["one", "two"]


def test_draining(api):
    api.context.draining = True
    for path in (PATH, "/v1/images/generations"):
        answer = api.post(path, json={"prompt": "x"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
    assert api.get("/readyz").status_code == 503 and api.get("/livez").status_code == 200
    assert api.get(PATH).status_code == 200


def test_json_of_a_row_survives_large_seeds(api):
    seed = 2**63 - 1
    assert finished(api, seed=seed)["seed"] == seed
    assert json.loads(api.get(PATH).text)["data"][0]["seed"] == seed
