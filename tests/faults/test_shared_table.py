"""Two servers on one PostgreSQL and one bucket: what one accepts, the other shows, runs and serves,
and goes on with when the first is killed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from tests import postgres
from tests.faults.engine import brightness
from tests.faults.harness import FaultServer, failing_start
from tests.server.test_storage import BUCKET, S3Server

STEPS = {"num_inference_steps": 10}


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres.running() as url:
        yield url


@pytest.fixture
def flags(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    postgres.fresh(database)
    monkeypatch.setenv("SGLD_S3_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("SGLD_S3_SECRET_ACCESS_KEY", "test-secret")
    bucket = S3Server()
    try:
        yield ["--database-url", database, "--s3-bucket", BUCKET,
               "--s3-endpoint-url", bucket.url, "--s3-region", "us-east-1"]  # fmt: skip
    finally:
        bucket.stop()


def events(url: str) -> dict[str, list[tuple[str, str]]]:
    """Kind and detail of every event of every job, in order."""
    import psycopg

    found: dict[str, list[tuple[str, str]]] = {}
    with psycopg.connect(url) as db:
        for job_id, kind, detail in db.execute(
            "SELECT job_id, kind, detail FROM events ORDER BY number"
        ):
            found.setdefault(job_id, []).append((kind, detail))
    return found


def taken(url: str) -> list[str]:
    """The jobs that node b took over."""
    return [job for job, told in events(url).items() if ("moved", '{"to": "b"}') in told]


def content(server: FaultServer, video_id: str) -> bytes | None:
    """The file, from the server or from where it sends us; None while it is under way there."""
    answer = server.http.get(f"/v1/videos/{video_id}/content", follow_redirects=True)
    return answer.content if answer.status_code == 200 else None


def brightness_of(data: bytes) -> float:
    with av.open(io.BytesIO(data)) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 5
    return float(np.mean(frames))


def test_two_servers(tmp_path: Path, database: str, flags: list[str]) -> None:
    first = FaultServer(tmp_path / "a", *flags, "--node-name", "a")
    second = FaultServer(tmp_path / "b", *flags, "--node-name", "b")
    servers = [first, second]
    try:
        first.wait_worker()
        second.wait_worker()
        marker = first.hold()  # until the other one has something to do
        jobs = {first.make("@hold:5", seed=seed, **STEPS): seed for seed in range(10)}
        second.wait_until("some come over", lambda: taken(database))
        marker.unlink()
        listed = second.http.get("/v1/videos").json()["data"]
        assert {video["id"] for video in listed} == set(jobs)
        for video_id, seed in jobs.items():
            assert second.finished(video_id)["status"] == "completed"
            for server in servers:
                data = server.wait_until("the copy", lambda s=server, v=video_id: content(s, v), 60)
                assert abs(brightness_of(data) - brightness(seed)) < 6
        made = list((tmp_path / "b" / "videos").glob("*.mp4"))
        assert len(made) == len(taken(database)) >= 1

        first.hold()
        running = first.make("@hold:9", num_inference_steps=10)
        first.wait_until("it runs", lambda: first.state(running)["status"] == "in_progress")
        second.wait_until("how far it is", lambda: second.state(running)["progress"] > 0)
        assert second.delete(running) == 200
        busy = 'jobs_in_progress{kind="video"}'
        first.wait_until("it has ended", lambda: first.sample(busy) == 0)
        assert first.http.get(f"/v1/videos/{running}").status_code == 404

        more = {first.make("@hold:5", seed=seed, **STEPS): seed for seed in range(20, 26)}
        first.wait_until(
            "some run", lambda: any(first.state(v)["status"] == "in_progress" for v in more)
        )
        first.die()
        first.close()
        marker.unlink()
        for video_id, seed in more.items():
            assert second.finished(video_id)["status"] == "completed"
            data = second.wait_until("the file", lambda v=video_id: content(second, v))
            assert abs(brightness_of(data) - brightness(seed)) < 6
        servers[0] = FaultServer(tmp_path / "a", *flags, "--node-name", "a")
        servers[0].wait_worker()
        assert servers[0].finished(next(iter(more)))["status"] == "completed"
        for video_id, told in events(database).items():
            ends = [kind for kind, _ in told if kind in ("completed", "failed")]
            assert ends == ([] if video_id == running else ["completed"]), told
    finally:
        for server in servers:
            server.close()


def test_two_servers_of_one_name(tmp_path: Path, database: str) -> None:
    postgres.fresh(database)
    server = FaultServer(tmp_path / "a", "--database-url", database, "--node-name", "a")
    try:
        done = failing_start(tmp_path / "b", "--database-url", database, "--node-name", "a")
        assert done.returncode == 3 and "running as node 'a'" in done.stderr
    finally:
        server.close()
