"""Adapters on a real server: the documented example, changes under load, and workers that die."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.e2e.adapters import write_served
from tests.e2e.server import ROOT, Server

SMALL = {"prompt": "a red fox", "size": "32x32", "num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return write_served(folder, "a", 1, 4), write_served(folder, "b", 2, 8)


@pytest.fixture(scope="module", autouse=True)
def no_set(server: Server) -> None:
    server.http.post("/v1/unmerge_lora_weights")


def image(server: Server, **more: Any) -> str:
    """The pixels as a digest; the file also names its adapters."""
    answer = server.http.post("/v1/images/generations", json={**SMALL, **more})
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return hashlib.sha256(Image.open(io.BytesIO(data)).tobytes()).hexdigest()


def frames(server: Server, video_id: str) -> list[bytes]:
    data = server.http.get(f"/v1/videos/{video_id}/content").content
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


def call(server: Server, path: str, **body: Any) -> httpx.Response:
    return server.http.post(f"/v1/{path}", json=body)


def test_the_example(server: Server, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", ROOT / "examples/lora_switching.sh", server.url, *adapters, tmp_path],
        env={**os.environ, "SIZE": "64x64", "STEPS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == "A differs from the base, B from A, and the base is back byte for byte."
    pictures = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("base", "a", "b")}
    assert len(set(pictures.values())) == 3
    assert (tmp_path / "again.png").read_bytes() == pictures["base"]


def test_a_request_with_its_own_adapter_is_the_merged_picture(
    server: Server, adapters: tuple[Path, Path]
) -> None:
    base = image(server)
    own = {"nickname": "own", "path": str(adapters[0]), "strength": 0.7}
    answer = image(server, lora=[own])
    assert answer != base
    model = server.http.get("/v1/models").json()["data"]
    assert f"{model[0]['id']}:own" in [entry["id"] for entry in model]
    assert image(server, model=f"{model[0]['id']}:own") != base
    assert call(server, "set_lora", lora_nickname="own", strength=0.7).status_code == 200
    conflict = server.http.post("/v1/images/generations", json={**SMALL, "lora": [own]})
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "lora_set_in_use")
    merged = server.http.get("/v1/list_loras").json()
    (use,) = merged["active"]["transformer"]
    assert use["merged"] and use["strength"] == 0.7
    assert merged["memory"]["unmerge_bytes"] > 0
    assert server.http.delete("/v1/loras/own").status_code == 409
    assert call(server, "unmerge_lora_weights").status_code == 200
    assert image(server) == base
    assert server.http.delete("/v1/loras/own").status_code == 200
    missing = server.http.post(
        "/v1/images/generations", json={**SMALL, "lora": [{"nickname": "own"}]}
    )
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "lora_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"lora_nickname": "nobody"}, 404, "lora_not_found"),
        ({"lora_nickname": "x", "lora_path": "/etc/passwd"}, 400, "invalid_lora"),
        ({"lora_nickname": "x", "lora_path": "../../x"}, 400, "invalid_lora"),
        (
            {"lora_nickname": "a", "lora_path": "A", "target": "critic"},
            400,
            "invalid_target",
        ),
    ],
)
def test_what_fails_leaves_everything_as_it_was(
    server: Server, adapters: tuple[Path, Path], body: dict[str, Any], status: int, code: str
) -> None:
    assert call(server, "set_lora", lora_nickname="b", lora_path=str(adapters[1])).is_success
    before = image(server)
    if body.get("lora_path") == "A":
        body = {**body, "lora_path": str(adapters[0])}
    answer = call(server, "set_lora", **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert image(server) == before
    assert call(server, "unmerge_lora_weights").is_success


LAYER, W = "blocks.0.attn1.to_q", 256  # from W to W
MERGED_ONLY = {
    "LoHa": {"hada_w1_a": (W, 2), "hada_w1_b": (2, W), "hada_w2_a": (W, 2), "hada_w2_b": (2, W)},
    "LoKr": {"lokr_w1": (16, 16), "lokr_w2": (16, 16)},
    "DoRA": {"lora_A.weight": (2, W), "lora_B.weight": (W, 2), "lora_magnitude_vector": (W,)},
    "full": {"diff": (W, W), "diff_b": (W,)},
}


@pytest.mark.parametrize("kind", MERGED_ONLY)
def test_what_can_only_be_merged_is_refused_per_request_by_name(
    server: Server, tmp_path: Path, kind: str
) -> None:
    base = image(server)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"transformer.{LAYER}.{part}": torch.rand(*shape, generator=generator)
        for part, shape in MERGED_ONLY[kind].items()
    }
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    own = {"nickname": kind, "path": str(path)}
    refused = server.http.post("/v1/images/generations", json={**SMALL, "lora": [own]})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "lora_merge_only", "lora")
    assert f"transformer.{LAYER} ({kind})" in error["message"]
    assert call(server, "set_lora", lora_nickname=kind, lora_path=str(path)).is_success
    assert image(server) != base
    assert call(server, "unmerge_lora_weights").is_success
    assert image(server) == base


def test_a_request_says_which_file_it_means(server: Server, adapters: tuple[Path, Path]) -> None:
    """Of a folder that holds several, and not another one by a nickname that is taken."""
    folder, (a, b) = str(adapters[0].parent), (path.name for path in adapters)
    several = server.http.post(
        "/v1/images/generations",
        json={**SMALL, "lora": [{"nickname": "several", "path": folder}]},
    )
    assert (several.status_code, several.json()["error"]["code"]) == (400, "invalid_lora")
    made = {}
    for name in (a, b):
        use = {"nickname": f"from {name}", "path": folder, "weight_name": name}
        made[name] = image(server, lora=[use])
        alone = {"nickname": f"alone {name}", "path": f"{folder}/{name}"}
        assert image(server, lora=[alone]) == made[name]
    assert made[a] != made[b]
    taken = {"nickname": f"from {a}", "weight_name": b}
    answer = server.http.post("/v1/images/generations", json={**SMALL, "lora": [taken]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "lora_nickname_taken")


def test_running_jobs_end_with_the_weights_they_began_with(
    server: Server, adapters: tuple[Path, Path]
) -> None:
    want = {"base": image(server)}
    assert call(server, "set_lora", lora_nickname="a", lora_path=str(adapters[0])).is_success
    want["a"] = image(server)
    assert call(server, "unmerge_lora_weights").is_success
    clip = {"num_inference_steps": 60, "num_frames": 5, "seed": 3}
    first = server.video(**clip)
    assert server.finished(first)["status"] == "completed"
    slow = server.video(**clip)
    server.wait_until("it runs", lambda: server.state(slow)["status"] == "in_progress")

    answers: dict[str, Any] = {}

    def change() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            answers["change"] = http.post("/v1/set_lora", json={"lora_nickname": "a"})

    thread = threading.Thread(target=change)
    thread.start()
    waiting = server.wait_until(
        "the change waits",
        lambda: (s := server.http.get("/v1/list_loras").json())["state"] == "changing" and s,
    )
    assert waiting["active"] == {} and waiting["jobs_ahead"] == 1
    after = image(server)  # waits behind the change
    assert after == want["a"]
    thread.join()
    assert server.finished(slow)["status"] == "completed"
    assert frames(server, slow) == frames(server, first), "it ended with the weights it began with"
    assert answers["change"].status_code == 200
    assert call(server, "unmerge_lora_weights").is_success
    assert image(server) == want["base"]


def test_the_next_worker_has_the_same_set(server: Server, adapters: tuple[Path, Path]) -> None:
    assert call(
        server, "set_lora", lora_nickname=["a", "b"], lora_path=[str(a) for a in adapters],
        strength=[0.5, 0.9],
    ).is_success  # fmt: skip
    before, active = image(server), server.http.get("/v1/list_loras").json()["active"]
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    server.wait_until("another worker", lambda: server.workers() not in ([], [worker]))
    server.wait_ready()
    assert server.http.get("/v1/list_loras").json()["active"] == active
    assert image(server) == before
    assert call(server, "unmerge_lora_weights").is_success


def test_videos_keep_their_place_before_and_behind_a_change(
    server: Server, adapters: tuple[Path, Path]
) -> None:
    """More videos than the worker is given at once: all those before the change end without it."""
    assert call(server, "set_lora", lora_nickname="a", lora_path=str(adapters[0])).is_success
    clip = {"num_inference_steps": 1, "num_frames": 1, "seed": 3}
    with_a = server.video(**clip)
    assert server.finished(with_a)["status"] == "completed"
    assert call(server, "unmerge_lora_weights").is_success
    early = [server.video(**clip) for _ in range(40)]
    thread = threading.Thread(target=call, args=(server, "set_lora"), kwargs={"lora_nickname": "a"})
    thread.start()
    server.wait_until(
        "the change waits or is made",
        lambda: (s := server.http.get("/v1/list_loras").json())["waiting_changes"] or s["active"],
    )
    late = server.video(**clip)
    thread.join()
    assert [server.finished(one)["status"] for one in (*early, late)] == ["completed"] * 41
    assert frames(server, late) == frames(server, with_a)
    assert frames(server, early[0]) == frames(server, early[-1]) != frames(server, late)
    assert call(server, "unmerge_lora_weights").is_success
