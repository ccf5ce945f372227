"""What a worker can do to a server: one server lives through all of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.engine import SECRET
from tests.faults.harness import FaultServer, check, history


def restarts(server: FaultServer) -> float:
    return sum(value for name, value in server.metrics().items() if "worker_restarts_total" in name)


def running(server: FaultServer, video_id: str) -> None:
    server.wait_until("it runs", lambda: server.state(video_id)["status"] == "in_progress")


def test_a_killed_worker(server: FaultServer) -> None:
    """The job runs once more; a waiting image request does not notice."""
    before = restarts(server)
    marker = server.hold()
    video_id = server.make("@hold:9", seed=11)
    running(server, video_id)
    with ThreadPoolExecutor() as pool:
        image = pool.submit(server.image, "@hold:9")
        server.wait_until("both", lambda: server.sample("jobs_running") == 2)
        os.kill(server.workers()[0], signal.SIGKILL)
        marker.unlink()
        assert image.result().status_code == 200
    done = server.finished(video_id)
    assert (done["status"], done["attempt"]) == ("completed", 2)
    assert restarts(server) == before + 1


@pytest.mark.parametrize("way", ["abort", "kill", "exit"])
def test_a_job_that_kills_workers(server: FaultServer, way: str) -> None:
    """It is given up after two attempts. Its companions are not, and the next job is fine."""
    before = restarts(server)
    marker = server.hold()
    companions = [server.make("@hold:9", seed=seed) for seed in range(3)]
    running(server, companions[0])
    poison = server.make(f"@{way}:2")
    server.wait_until("it dies", lambda: restarts(server) == before + 1)
    marker.unlink()
    ended = server.finished(poison)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "worker_lost")
    assert ended["attempt"] == 2
    assert "in the last of 2 attempts" in ended["error"]["message"]
    assert {server.finished(one)["status"] for one in companions} == {"completed"}
    assert restarts(server) == before + 2


def test_python_runs_out_of_memory(server: FaultServer) -> None:
    before = restarts(server)
    failed = server.finished(server.make("@memory:3"))
    assert failed["error"]["code"] == "out_of_memory"
    assert SECRET not in failed["error"]["message"]
    assert restarts(server) == before


def test_the_device_runs_out_of_memory_twice(server: FaultServer) -> None:
    """The message has the numbers; a smaller request succeeds, in the same worker."""
    (worker,) = server.workers()
    for _ in range(2):
        failed = server.image("@oom:3")
        error = failed.json()["error"]
        assert (failed.status_code, error["code"]) == (500, "out_of_memory")
        assert "31.4 GB" in error["message"] and failed.headers["x-should-retry"] == "false"
    assert server.image().status_code == 200
    assert server.workers() == [worker]


@contextmanager
def little_memory(server: FaultServer, megabytes: int) -> Iterator[None]:
    """Workers, those of restarts too, get no more; who takes it is killed by the kernel."""
    root = Path("/sys/fs/cgroup/memory")
    name = "memory.limit_in_bytes" if root.is_dir() else "memory.max"
    group = (root if root.is_dir() else root.parent) / f"sgld-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(megabytes * 2**20))
    except OSError:
        pytest.skip("this machine lets nobody limit the memory of a process")
    over = threading.Event()

    def catch() -> None:
        while not over.wait(0.01):
            for worker in server.workers():
                with suppress(OSError):
                    (group / "cgroup.procs").write_text(str(worker))

    catcher = threading.Thread(target=catch)
    catcher.start()
    try:
        yield
    finally:
        over.set()
        catcher.join()
        for pid in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(pid)
        group.rmdir()


def test_the_kernel_kills_a_worker_that_takes_too_much(start: Callable[..., FaultServer]) -> None:
    """After two attempts the job fails for want of memory, and the next one is fine."""
    server = start("--worker-timeout", "60").wait_worker()
    with little_memory(server, 300):
        failed = server.finished(server.make("@slow:0.05 @hoard:10"))
    assert failed["error"]["code"] == "out_of_memory" and failed["attempt"] == 2
    assert server.metrics()['sgld_worker_restarts_total{reason="memory"}'] == 2
    assert server.finished(server.make())["status"] == "completed"
    check(server)


def test_a_bug_in_a_step(server: FaultServer) -> None:
    failed = server.finished(server.make("@raise:3"))
    assert failed["error"]["code"] == "engine_error"
    assert SECRET not in str(failed)
    answer = server.image("@raise:3")
    assert answer.status_code == 500 and SECRET not in answer.text


@pytest.mark.parametrize("way", ["hang", "stop"])
def test_a_worker_that_stands_still(server: FaultServer, way: str) -> None:
    """Silence ends it; a job that does it twice is given up."""
    before = restarts(server)
    failed = server.finished(server.make(f"@{way}:3"))
    assert failed["error"]["code"] == "worker_lost" and "silent" in failed["error"]["message"]
    assert restarts(server) == before + 2


def test_a_stopped_worker_is_replaced(server: FaultServer) -> None:
    marker = server.hold()
    video_id = server.make("@hold:9", seed=12)
    running(server, video_id)
    os.kill(server.workers()[0], signal.SIGSTOP)
    marker.unlink()
    done = server.finished(video_id)
    assert (done["status"], done["attempt"]) == ("completed", 2)


def test_a_slow_worker_is_not_killed(server: FaultServer) -> None:
    before = restarts(server)
    done = server.finished(server.make("@slow:0.2", seed=13, num_inference_steps=15))
    assert (done["status"], done["attempt"]) == ("completed", 1)
    assert restarts(server) == before


def test_many_deaths_are_told_and_jobs_still_run(server: FaultServer) -> None:
    """Five within ten minutes: balancers are sent away, the process is not restarted."""
    while (before := restarts(server)) < 5:
        os.kill(server.wait_worker().workers()[0], signal.SIGKILL)
        server.wait_until("noticed", lambda before=before: restarts(server) > before)
    server.wait_worker()
    told = server.http.get("/readyz")
    assert told.status_code == 503 and "died" in told.json()["reason"]
    assert server.http.get("/livez").status_code == 200
    assert server.finished(server.make())["status"] == "completed"


def test_the_history_of_a_job_that_was_given_up(server: FaultServer) -> None:
    poison = server.make("@abort:1")
    server.finished(poison)
    kinds = history(server.data_dir)[poison]
    assert kinds[0] == "created" and kinds[-1] == "failed"
    assert kinds.count("failed") == 1 and "completed" not in kinds
