"""The whole thing: server process, worker process, tiny model, real sockets and files."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_sdk_example(server, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/openai_client.py"), "--base-url", f"{server.url}/v1",
         "--output-path", str(tmp_path), "--size", "80x64", "--num-inference-steps", "3"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "star.png" in done.stdout and "ring.mp4" in done.stdout
    with Image.open(tmp_path / "star.png") as picture:
        assert picture.format == "PNG" and picture.size == (80, 64)
        assert len(np.unique(np.asarray(picture))) > 16  # a picture, not a flat area
    with av.open(str(tmp_path / "ring.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (80, 64, 16)
        assert sum(1 for _ in container.decode(stream)) == 17


def test_the_line_to_paste_leaves_a_picture(server, tmp_path):
    """A fresh server says where the playground is and what to type; both are true."""
    said = [server.process.stdout.readline() for _ in range(3)]
    assert said[0] == f"playground: {server.url}/\n" and "no --model-path" in said[1]
    assert "<title>" in server.http.get("/").text
    done = subprocess.run(
        ["bash", "-c", said[2]], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    with Image.open(tmp_path / "circle.png") as picture:
        assert picture.format == "PNG", done.stderr


def image(server, **body):
    answer = server.http.post(
        "/v1/images/generations",
        json={"prompt": "a cat", "size": "128x128", "response_format": "b64_json", **body},
    )
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def test_a_short_request_does_not_wait_for_a_long_one(server):
    """It begins while the other runs and ends before it; neither sees a difference."""
    long, short = {"seed": 1, "num_inference_steps": 200}, {"seed": 2, "num_inference_steps": 5}
    alone = image(server, **long), image(server, **short)
    rows = "sgld_denoise_rows_total"
    before = server.metrics()[rows]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(image, server, **long)
        server.wait_until("the first one runs", lambda: server.metrics()[rows] > before)
        second = pool.submit(image, server, **short).result()
        assert not first.done()
        together = first.result(), second
    # Counters travel with the heartbeat.
    server.wait_until("counters", lambda: server.metrics()[rows] == before + 205)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1


def frames(server, video_id):
    data = server.http.get(f"/v1/videos/{video_id}/content").content
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_killed_worker(server):
    """kill -9 mid-job: the server answers, the job runs again, the worker is back."""
    body = {"seed": 3, "num_frames": 17, "num_inference_steps": 60}
    undisturbed = server.video(**body)
    assert server.finished(undisturbed)["attempt"] == 1
    restarts = sum(v for k, v in server.metrics().items() if "worker_restarts_total" in k)

    video_id = server.video(**body)
    server.wait_until("progress", lambda: server.state(video_id)["progress"] >= 10, 60)
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    assert server.http.get("/livez").status_code == 200
    server.wait_until("not ready", lambda: not server.ready())
    assert server.state(video_id)["status"] in ("queued", "in_progress")
    server.wait_ready()
    assert server.workers() != [worker]

    done = server.finished(video_id)
    assert (done["status"], done["attempt"], done["seed"]) == ("completed", 2, 3)
    assert np.array_equal(frames(server, video_id), frames(server, undisturbed))
    after = sum(v for k, v in server.metrics().items() if "worker_restarts_total" in k)
    assert after == restarts + 1
    assert server.process.poll() is None


def test_a_killed_server(start):
    """kill -9 of the server: its worker goes too, and the next server ends the jobs."""
    first = start().wait_ready()
    made = [first.video(seed=seed, num_frames=5, num_inference_steps=20) for seed in (5, 6, 7)]
    first.wait_until("a job runs", lambda: first.state(made[0])["status"] == "in_progress", 60)
    (worker,) = first.workers()
    first.kill()
    first.process.wait()
    first.wait_until("its worker is gone", lambda: not Path(f"/proc/{worker}").exists())

    second = start()
    for seed, video_id in zip((5, 6, 7), made, strict=True):
        done = second.finished(video_id)
        assert (done["status"], done["seed"]) == ("completed", seed)
    listed = second.http.get("/v1/videos").json()["data"]
    assert [video["id"] for video in listed] == made[::-1]


def test_drain(start):
    """TERM: not ready at once, the running image is finished, no child is left, exit 0."""
    server = start().wait_ready()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(image, server, num_inference_steps=60)
        server.wait_until("it runs", lambda: server.metrics()["sgld_jobs_running"])
        workers = server.workers()
        server.kill(signal.SIGTERM)
        server.wait_until("not ready", lambda: not server.ready())
        assert server.http.get("/livez").status_code == 200
        refused = server.http.post("/v1/images/generations", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert running.result().shape == (128, 128, 3)
    assert server.process.wait(90) == 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_is_fast_and_the_job_survives(start):
    server = start().wait_ready()
    video_id = server.video(num_frames=17, num_inference_steps=200)
    server.wait_until("it runs", lambda: server.state(video_id)["status"] == "in_progress")
    server.kill(signal.SIGTERM)
    server.wait_until("not ready", lambda: not server.ready())
    server.kill(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert not server.workers()
    assert "Traceback" not in server.log.read_text()

    again = start()
    assert again.state(video_id)["status"] in ("queued", "in_progress")
    assert again.http.delete(f"/v1/videos/{video_id}").json()["deleted"] is True
    assert again.http.get(f"/v1/videos/{video_id}").status_code == 404
    again.kill(signal.SIGINT)
    assert again.process.wait(90) == 0


def test_a_signal_ends_a_server_whose_output_nobody_reads(start):
    """As in `sglang serve | head -1`; the signal comes while the model loads."""
    server = start()
    server.process.stdout.close()
    server.wait_until("alive", lambda: server.workers())
    server.kill(signal.SIGTERM)
    assert server.process.wait(90) == 0
    text = server.log.read_text()
    assert "Traceback" not in text and "trying again" not in text
    assert "BrokenPipe" not in text


def test_a_folder_without_a_model_ends_the_server(start, tmp_path):
    folder = tmp_path / "no-such-model"
    folder.mkdir()
    server = start("--model-path", str(folder))
    assert server.process.wait(60) == 4
    text = server.log.read_text()
    assert "error: " in text and "no-such-model" in text
    assert "Traceback" not in text.partition("error: ")[2]
