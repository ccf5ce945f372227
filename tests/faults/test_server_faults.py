"""What happens between one server and the next: kills, stops, damage, other models."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.faults.harness import FaultServer, check, failing_start, gone, history, rows

Start = Callable[..., FaultServer]
JOBS = 21


def kill_rounds(start: Start, rounds: int) -> None:
    """In every round a server takes jobs and is killed at a random moment; the next one finishes
    them: none is lost, none doubled, and each has the picture of its seed."""
    chance = random.Random(rounds)
    server = start()
    for number in range(rounds):
        server.wait_worker()
        known = _videos(server)
        killer = threading.Timer(chance.uniform(0.02, 1.2), server.kill)
        killer.start()
        told: dict[str, int] = {}
        for job in range(JOBS):
            seed = 100 * number + job
            try:
                told[server.make("@slow:0.01", seed=seed)] = seed
            except httpx.TransportError:
                break
        killer.join()
        server.process.wait()
        server = start().wait_worker()
        made = _videos(server) - known
        assert set(told) <= made, "a job was lost"
        assert len(made) <= len(told) + 1, "more jobs than requests"
        for job_id, seed in told.items():
            done = server.finished(job_id)
            assert (done["status"], done["seed"]) == ("completed", seed)
        for job_id in made - set(told):
            server.finished(job_id)
        listed = [video["id"] for video in _all_videos(server)]
        assert len(listed) == len(set(listed)) == len(known) + len(made)
        check(server)


def _videos(server: FaultServer) -> set[str]:
    return {job_id for job_id in rows(server.data_dir) if job_id.startswith("video_")}


def _all_videos(server: FaultServer) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    page = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after": page["last_id"]} if page["last_id"] else {}
        page = server.http.get("/v1/videos", params={"limit": 100, **after}).json()
        found += page["data"]
    return [video for video in found if video["prompt"] == "@slow:0.01"]


def test_five_kills(start: Start) -> None:
    kill_rounds(start, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_kills(start: Start) -> None:
    kill_rounds(start, 50)


def test_stopping_an_idle_server(start: Start) -> None:
    server = start().wait_worker()
    workers = server.workers()
    begun = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - begun < 25.0, "it waited as if something ran"
    assert all(gone(worker) for worker in workers)
    assert "Traceback" not in server.log.read_text()


def test_stopping_with_a_long_job(start: Start) -> None:
    """It is put back durably, at no cost to it, and the next server makes it."""
    server = start("--drain-timeout", "0.5").wait_worker()
    workers = server.workers()
    marker = server.hold()
    video_id = server.make("@hold:9", seed=5)
    server.wait_until("runs", lambda: server.state(video_id)["status"] == "in_progress")
    assert server.terminate() == 0
    marker.unlink()
    assert all(gone(worker) for worker in workers)
    assert rows(server.data_dir)[video_id][1] == "queued"
    with closing(sqlite3.connect(server.data_dir / "jobs.db")) as db:
        assert db.execute("SELECT interruptions FROM jobs").fetchone() == (0,)
    second = start()
    assert second.finished(video_id)["status"] == "completed"
    assert history(second.data_dir)[video_id][:3] == ["created", "in_progress", "queued"]
    check(second)


def test_stopping_refuses_new_work_at_once(start: Start) -> None:
    server = start("--drain-timeout", "80").wait_worker()
    server.hold()
    server.make("@hold:9")
    server.wait_until("runs", lambda: server.sample("jobs_running") == 1)
    server.kill(signal.SIGTERM)
    server.wait_until("not ready", lambda: server.http.get("/readyz").status_code == 503)
    refused = server.image()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert server.http.get("/livez").status_code == 200
    begun = time.monotonic()
    assert server.terminate() == 0  # the second signal is fast
    assert time.monotonic() - begun < 60.0, "it waited for the job"


def test_damage_between_two_servers(start: Start) -> None:
    """A broken database, or none at all, is rebuilt from the sidecars; jobs go on."""
    server = start().wait_worker()
    done = [server.make(seed=seed) for seed in range(3)]
    for video_id in done:
        server.finished(video_id)
    waiting = server.make("@slow:0.05", seed=9, num_inference_steps=40)
    server.die()
    (server.data_dir / "jobs.db").write_bytes(b"not a database at all " * 1000)
    for suffix in ("-wal", "-shm"):
        (server.data_dir / f"jobs.db{suffix}").unlink(missing_ok=True)
    second = start().wait_worker()
    assert "rebuilt" in second.log.read_text()
    assert {second.state(video_id)["status"] for video_id in done} == {"completed"}
    assert second.http.get(f"/v1/videos/{done[0]}/content").status_code == 200
    assert second.finished(waiting)["status"] == "completed"
    check(second)

    second.die()
    for part in second.data_dir.glob("jobs.db*"):
        part.unlink()
    third = start().wait_worker()
    assert {third.state(video_id)["status"] for video_id in (*done, waiting)} == {"completed"}
    check(third)


def test_what_is_swept_at_the_start(start: Start) -> None:
    server = start().wait_worker()
    kept, lost = server.make(seed=1), server.make(seed=2)
    for video_id in (kept, lost):
        server.finished(video_id)
    server.die()
    videos = server.data_dir / "videos"
    (videos / f"{lost}.mp4").unlink()
    old = videos / "video_0123456789.mp4"
    young = videos / "video_9876543210.mp4"
    part = videos / f".{kept}.mp4.part"
    inputs = server.data_dir / "inputs" / "video_0123456789"
    inputs.mkdir()
    for path in (old, young, part, inputs / "0.png"):
        path.write_bytes(b"x")
    for path in (old, inputs):
        os.utime(path, (1.0, 1.0))
    second = start().wait_worker()
    assert not old.exists() and not part.exists() and not inputs.exists()
    assert young.exists()  # it may belong to somebody who is not done
    for tail in ("", "/content"):
        answer = second.http.get(f"/v1/videos/{lost}{tail}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_expired")
    assert second.state(kept)["status"] == "completed"
    young.unlink()
    check(second)


def test_another_model(start: Start) -> None:
    """A job runs on the model it was accepted for, or not at all."""
    server = start().wait_worker()
    video_id = server.make("@slow:0.05", num_inference_steps=100)
    server.die()
    second = start("--served-model-name", "other")
    failed = second.finished(video_id)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "model_changed")
    check(second)


def test_the_same_data_folder_twice(start: Start) -> None:
    server = start().wait_worker()
    second = failing_start(server.data_dir, "--port", "0")
    assert second.returncode == 3 and str(server.process.pid) in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    check(server)


def test_the_same_port_twice(start: Start, tmp_path: Path) -> None:
    server = start().wait_worker()
    second = failing_start(tmp_path / "other", "--port", str(server.port))
    assert second.returncode == 98 and str(server.process.pid) in second.stderr


def test_a_data_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    failed = failing_start(tmp_path / "file" / "data", "--port", "0")
    assert failed.returncode == 3 and len(failed.stderr.strip().splitlines()) == 1


def test_a_full_disk_is_told_and_recovers(start: Start) -> None:
    """Below the floor nothing is taken in, and what is there is still served."""
    first = start().wait_worker()
    video_id = first.make()
    first.finished(video_id)
    first.terminate()
    floor = shutil.disk_usage(first.data_dir).free / 1e9 + 5
    server = start("--min-free-gb", str(floor)).wait_worker()
    for answer in (server.image(), server.http.post("/v1/videos", json={"prompt": "x"})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "insufficient_storage")
        assert answer.headers["x-should-retry"] == "false"
    assert server.http.get("/readyz").status_code == 503
    assert server.http.get("/livez").status_code == 200
    assert server.http.get(f"/v1/videos/{video_id}/content").status_code == 200
    server.terminate()
    check(start())


def test_old_jobs_are_forgotten(start: Start) -> None:
    """Row and files go together; for a day the server still knows that there was something."""
    server = start("--retention-hours", "0").wait_worker()
    video_id = server.make()
    server.finished(video_id)
    server.die()
    second = start().wait_worker()
    for tail in ("", "/content"):
        answer = second.http.get(f"/v1/videos/{video_id}{tail}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_expired")
    assert not list((second.data_dir / "videos").iterdir())
    check(second)


def test_a_worker_that_cannot_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    marker = tmp_path / "data" / "broken"
    marker.touch()
    server = start()
    told = server.wait_until(
        "told why",
        lambda: (
            server.sample('worker_restarts_total{reason="load"}') >= 2
            and server.http.get("/readyz")
        ),
    )
    assert told.status_code == 503 and "The weights are bad" in told.json()["reason"]
    assert server.http.get("/livez").status_code == 200
    marker.unlink()
    check(server)


def test_only_the_port_listens(start: Start) -> None:
    """Server and worker talk through sockets that nobody else can reach."""
    server = start().wait_worker()
    found = []
    for pid in (server.process.pid, *server.workers()):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            inode = os.readlink(descriptor)
            if inode.startswith("socket:"):
                found.append(inode[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in found:
                listening.append(int(fields[1].rpartition(":")[2], 16))
    assert listening == [server.port]
    with socket.create_connection(("127.0.0.1", server.port)):
        pass
