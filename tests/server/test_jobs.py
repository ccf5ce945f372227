"""Admission, repeats, retention and what the metrics say of them, in process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

from sgl_diffusion.base.config import JobOptions
from sgl_diffusion.base.errors import BusyError, RequestError
from sgl_diffusion.server.admission import Admission
from sgl_diffusion.server.background import IN_FLIGHT
from sgl_diffusion.server.flights import Flights
from sgl_diffusion.server.keys import Keys
from sgl_diffusion.server.repeats import Origin

VIDEOS, IMAGES = "/v1/videos", "/v1/images/generations"
ONE, TWO, ADMIN = ("k" * 20, "m" * 20, "a" * 20)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class Room:
    def check(self) -> None:
        pass


def test_a_queue_refuses_with_a_time_that_the_sdk_waits() -> None:
    admission = Admission(JobOptions(max_queued_videos=2), Room())
    tickets = [admission.enter("video", "anonymous") for _ in range(2)]
    waits = set()
    for _ in range(50):
        with pytest.raises(BusyError, match="The queue is full: 2 videos are waiting") as caught:
            admission.enter("video", "anonymous")
        waits.add(caught.value.retry_after)
    assert all(1 <= wait <= 110 for wait in waits)
    admission.enter("image", "anonymous")  # another queue
    admission._paces["video"]._per_job = 1000.0
    spread = set()
    for _ in range(50):
        with pytest.raises(BusyError) as caught:
            admission.enter("video", "anonymous")
        spread.add(caught.value.retry_after)
    assert max(spread) <= 110 and len(spread) > 5
    tickets[0].close()
    admission.enter("video", "anonymous")


def test_a_key_has_its_share() -> None:
    admission = Admission(JobOptions(max_images_per_key=2), Room())
    with admission.enter("image", "a"), admission.enter("image", "a"):
        with pytest.raises(BusyError, match="--max-images-per-key"):
            admission.enter("image", "a")
        admission.enter("image", "b").close()
    admission.enter("image", "a").close("out_of_memory")
    nobody = [admission.enter("image", "anonymous") for _ in range(20)]  # without keys: no shares
    assert len(nobody) == 20
    counted = {
        tuple(m.labels.values()): m.value for m in admission.metrics() if m.name == "job_total"
    }
    assert counted == {
        ("image", "completed", ""): 3,
        ("image", "failed", "out_of_memory"): 1,
    }


def test_jobs_of_another_key_do_not_exist(make_api: Callable[..., Any]) -> None:
    api = make_api(keys=Keys.of([ONE, TWO], [ADMIN]), jobs=JobOptions(max_videos_per_key=1))
    api.client.gate.clear()
    made = api.post(VIDEOS, json={"prompt": "x"}, headers=bearer(ONE)).json()
    path = f"{VIDEOS}/{made['id']}"
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events")):
        answer = api.request(method, path + tail, headers=bearer(TWO))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    assert api.get(VIDEOS, headers=bearer(TWO)).json()["data"] == []
    assert len(api.get(VIDEOS, headers=bearer(ADMIN)).json()["data"]) == 1
    assert api.get(f"{VIDEOS}?after={made['id']}", headers=bearer(TWO)).status_code == 400
    full = api.post(VIDEOS, json={"prompt": "x"}, headers=bearer(ONE))
    assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
    assert api.post(VIDEOS, json={"prompt": "x"}, headers=bearer(TWO)).status_code == 200
    assert api.get(path, headers=bearer(ONE)).status_code == 200


def test_the_oldest_go_when_there_is_too_much(make_api: Callable[..., Any]) -> None:
    api = make_api()
    made = [api.post(VIDEOS, json={"prompt": str(n)}).json()["id"] for n in range(3)]
    for video_id in made:
        api.wait_for(video_id, "completed")
    rows = [api.run(api.jobs.get(video_id)) for video_id in made]
    sizes = [sum(file["bytes"] for file in row.files) for row in rows]
    api.context.keeper._options = JobOptions(max_disk_gb=(sizes[1] + sizes[2]) / 1e9)
    api.run(api.context.keeper.tidy())
    left = [video["id"] for video in api.get(VIDEOS).json()["data"]]
    ended = sorted(rows, key=lambda row: row.completed_at)
    assert sorted(left) == sorted(row.id for row in ended[1:])
    gone = api.get(f"{VIDEOS}/{ended[0].id}")
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "video_expired"
    assert not list((api.folder / "videos").glob(f"{ended[0].id}*"))
    assert f"sgld_stored_bytes {float(sum(sizes) - sizes[rows.index(ended[0])])}" in metrics(api)


def metrics(api: Any) -> str:
    return str(api.get("/metrics").text)


def test_deleted_videos_are_counted_at_once_wherever_they_were(api: Any) -> None:
    api.client.gate.clear()
    made = [api.post(VIDEOS, json={"prompt": str(n)}).json()["id"] for n in range(IN_FLIGHT + 3)]
    assert f'sgld_queue_depth{{kind="video"}} {float(len(made))}' in metrics(api)
    api.until(lambda: len(api.client.handles) == IN_FLIGHT)
    assert made[-1] not in api.client.handles, "it waits for a place"
    for count, video_id in enumerate((made[0], made[-1]), 1):
        assert api.request("DELETE", f"{VIDEOS}/{video_id}").status_code == 200
        shown = metrics(api)
        assert f'sgld_queue_depth{{kind="video"}} {float(len(made) - count)}' in shown
        ended = f'code="cancelled",kind="video",outcome="failed"}} {float(count)}'
        assert ended in shown
        series = 'sgld_request_seconds_count{kind="video",outcome="cancelled"}'
        assert f"{series} {float(count)}" in shown
    api.client.gate.set()
    completed = 'sgld_request_seconds_count{kind="video",outcome="completed"}'
    api.until(lambda: f"{completed} {float(len(made) - 2)}" in metrics(api))
    assert made[-1] not in api.client.handles


def test_a_video_says_when_it_expires(make_api: Callable[..., Any]) -> None:
    api = make_api(jobs=JobOptions(retention_hours=2))
    video = api.post(VIDEOS, json={"prompt": "x"}).json()
    assert video["expires_at"] is None
    done = api.wait_for(video["id"], "completed")
    assert abs(done["expires_at"] - done["completed_at"] - 7200) <= 1


def test_a_retry_of_a_video_is_the_same_video(api: Any) -> None:
    api.client.gate.clear()
    body = {"prompt": "x", "seed": 4}
    first = api.post(VIDEOS, json=body).json()
    retried = {"x-stainless-retry-count": "1"}
    assert api.post(VIDEOS, json=body, headers=retried).json()["id"] == first["id"]
    form = [(name, (None, str(value))) for name, value in body.items()]
    assert api.post(VIDEOS, files=form, headers=retried).json()["id"] != first["id"]
    assert api.post(VIDEOS, json=body).json()["id"] != first["id"]
    other = api.post(VIDEOS, json={**body, "seed": 5}, headers=retried).json()
    assert other["id"] != first["id"] and other["seed"] == 5


def test_a_retry_of_an_image_joins_or_gets_what_was_made(api: Any) -> None:
    api.client.gate.clear()
    body = {"prompt": "x", "response_format": "b64_json"}
    retried = {"x-stainless-retry-count": "2"}

    async def both() -> list[Any]:
        first = asyncio.create_task(api.http.post(IMAGES, json=body))
        while not api.client.submitted:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(api.http.post(IMAGES, json=body, headers=retried))
        await asyncio.sleep(0.1)
        api.client.gate.set()
        return [await first, await second]

    first, second = api.run(both())
    assert first.json() == second.json() and len(api.client.submitted) == 1
    assert api.post(IMAGES, json=body, headers=retried).json() == first.json()
    assert len(api.client.submitted) == 1
    assert api.post(IMAGES, json=body).json()["id"] != first.json()["id"]


def test_an_image_under_a_key_is_known_after_a_restart(make_api: Callable[..., Any]) -> None:
    headers = {"idempotency-key": "same"}
    body = {"prompt": "x", "n": 2, "response_format": "b64_json", "quality": "high"}
    first = make_api()
    answer = first.post(IMAGES, json=body, headers=headers).json()
    first.close()
    second = make_api()
    assert second.post(IMAGES, json=body, headers=headers).json() == answer
    assert second.client.submitted == []
    other = second.post(IMAGES, json={**body, "n": 1}, headers=headers)
    assert other.status_code == 409 and other.json()["error"]["code"] == "idempotency_key_reused"


class _Asker:
    """As much of a request as a flight looks at."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def test_work_ends_when_the_last_one_who_waits_has_left() -> None:
    async def story() -> None:
        ended: list[str] = []

        async def make() -> dict[str, Any]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return {}

        flights, askers = Flights(), [_Asker(), _Asker()]
        again = Origin("a", None, True, "hash")
        waiting = [asyncio.create_task(flights.answer(one, again, make)) for one in askers]  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        askers[0].leaves.set()
        assert await waiting[0] is None and not ended
        askers[1].leaves.set()
        assert await waiting[1] is None and ended == ["cancelled"]
        assert flights._find(again) is None

    asyncio.run(story())


def test_answers_are_kept_as_far_as_they_fit() -> None:
    async def story() -> None:
        made: list[str] = []

        async def make(name: str) -> dict[str, Any]:
            made.append(name)
            return {"name": name, "data": [{"b64_json": b"x" * 400}]}

        async def ask(name: str) -> None:
            origin = Origin("a", None, True, name)
            answer = await flights.answer(_Asker(), origin, lambda: make(name))  # type: ignore[arg-type]
            assert answer is not None and answer["name"] == name

        flights = Flights(kept_bytes=1000)
        for name in ("one", "two", "three", "three", "two", "one"):
            await ask(name)
        assert made == ["one", "two", "three", "one"]

    asyncio.run(story())


def test_a_failure_is_not_kept() -> None:
    async def story() -> None:
        async def fail() -> dict[str, Any]:
            raise RequestError("No.")

        async def succeed() -> dict[str, Any]:
            return {"data": []}

        flights, origin = Flights(), Origin("a", "key", False, "hash")
        with pytest.raises(RequestError):
            await flights.answer(_Asker(), origin, fail)  # type: ignore[arg-type]
        assert await flights.answer(_Asker(), origin, succeed) == {"data": []}  # type: ignore[arg-type]

    asyncio.run(story())


def test_the_metrics_worth_an_alert(api: Any) -> None:
    api.get(f"{VIDEOS}?limit=0")
    api.wait_for(api.post(VIDEOS, json={"prompt": "x"}).json()["id"], "completed")
    text = metrics(api)
    for name in (
        'sgld_queue_depth{kind="image"}',
        'sgld_queue_depth{kind="video"}',
        'sgld_job_total{code="",kind="video",outcome="completed"} 1.0',
        'sgld_rejected_total{code="out_of_range"} 1.0',
        "sgld_disk_free_bytes",
        "sgld_db_commit_seconds_count",
        "sgld_open_fds",
        "sgld_resident_bytes",
        "sgld_event_loop_lag_seconds",
    ):
        assert name in text, name


def test_an_attempt_that_is_charged_while_a_job_waits_is_stored(api: Any) -> None:
    api.client.gate.clear()
    api.client.attempt = 2  # a worker died under it, and it is in the queue again
    video = api.post(VIDEOS, json={"prompt": "x"}).json()["id"]
    while api.run(api.jobs.get(video)).attempts != 2:
        assert api.get(f"{VIDEOS}/{video}").json()["status"] == "queued"
    assert api.get(f"{VIDEOS}/{video}").json()["attempt"] == 2


def test_what_the_outer_guards_refuse_is_counted(make_api: Callable[..., Any]) -> None:
    api = make_api(keys=Keys.of([ONE], [ADMIN]), public_metrics=True)
    api.get("/livez", headers={"host": "evil.test"})
    api.get("/livez", headers={"origin": "https://evil.test"})
    api.get(VIDEOS)
    api.get(VIDEOS, headers=bearer(TWO))
    api.post("/v1/set_lora", json={}, headers=bearer(ONE))
    counted = set(re.findall(r'sgld_rejected_total\{code="(\w+)"\} 1\.0', metrics(api)))
    assert counted == {
        "host_not_allowed",
        "origin_not_allowed",
        "missing_api_key",
        "invalid_api_key",
        "admin_key_required",
    }


def test_a_job_runs_with_its_adapters_or_not_at_all(
    make_api: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use = {"nickname": "ink", "strength": 0.5, "target": "transformer"}
    first = make_api()
    first.client.gate.clear()
    plain = first.post(VIDEOS, json={"prompt": "x"}).json()["id"]
    monkeypatch.setattr(first.client.loras, "active", lambda: [use])
    inked = first.post(VIDEOS, json={"prompt": "y"}).json()["id"]
    first.call(first.context.runner.stop_taking)
    first.close()
    second = make_api()
    assert second.wait_for(plain, "completed", "failed")["status"] == "completed"
    failed = second.wait_for(inked, "completed", "failed")
    assert failed["error"]["code"] == "adapters_changed"
