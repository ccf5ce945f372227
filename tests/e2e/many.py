"""Servers of many processes, and what they answered with."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.e2e.server import Server


def start_server(folder: Path, *flags: str) -> Iterator[Server]:
    running = Server(folder / "data", *flags)

    def ready() -> bool:
        assert running.process.poll() is None, running.log.read_text()
        return running.ready()

    try:
        running.wait_until("ready", ready, 300)
        yield running
    finally:
        running.close()


def pictures(server: Server, **body: Any) -> NDArray[np.int64]:
    answer = server.http.post(
        "/v1/images/generations",
        json={"prompt": "a fox", "response_format": "b64_json", "num_inference_steps": 4, **body},
    )
    assert answer.status_code == 200, answer.text
    decoded = [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in decoded]).astype(int)


def frames(server: Server, video_id: str) -> NDArray[np.uint8]:
    data = server.http.get(f"/v1/videos/{video_id}/content").content
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def same(one: NDArray[Any], other: NDArray[Any]) -> None:
    assert one.shape == other.shape and np.ptp(one) > 16
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def ranks(server: Server) -> list[int]:
    """The worker's other processes: children of the child of the server."""
    (worker,) = server.workers()
    children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    return [int(child) for child in children]
