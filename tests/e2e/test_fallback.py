"""Families without a native recipe behind a real server: the same routes, seeds and cancelling."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.e2e.server import Server, running_server

# The schedulers of these families hand tensors to numpy in a way that it wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

IMAGES: dict[str, dict[str, Any]] = {
    "tiny_sdxl": {"negative_prompt": "blurry", "guidance_scale": 6.0, "width": 48, "height": 32},
    "tiny_sana": {"guidance_scale": 4.0, "width": 96, "height": 64},
}


def theirs(path: Path, seed: int, **call: Any) -> np.ndarray:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    result = pipe("a red fox", generator=generator, output_type="np", **call)
    clip = result.frames[0] if hasattr(result, "frames") else result.images
    return np.asarray(clip) * 255


@pytest.mark.parametrize("name", IMAGES)
def test_pictures_over_http(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    call = {**IMAGES[name], "num_inference_steps": 3}
    size = f"{call.pop('width')}x{call.pop('height')}"
    with running_server(tmp_path / "data", "--model-path", str(path)) as server:
        assert server.http.get("/models").json()["backend"] == "diffusers"
        body = {"prompt": "a red fox", "size": size, "response_format": "b64_json", **call}
        answer = server.http.post("/v1/images/generations", json={**body, "seed": 8, "n": 2})
        assert answer.status_code == 200, answer.text
        data = [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]
        refused = server.http.post("/v1/images/generations", json={**body, "size": "50x32"})
        assert refused.status_code == 400 and "Nearest" in refused.text
    for picture, seed in zip(data, (8, 9), strict=True):
        frame = np.asarray(Image.open(io.BytesIO(picture))).astype(float)
        expected = theirs(path, seed, **IMAGES[name], num_inference_steps=3)[0]
        assert np.abs(frame - expected).max() <= 1.01


@pytest.fixture(scope="module")
def ltx(tiny_ltx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ltx") / "data"
    with running_server(folder, "--model-path", str(tiny_ltx)) as server:
        yield server


BRIGHTNESS = (0.299, 0.587, 0.114)
CLIP = {"prompt": "a red fox", "size": "96x64", "num_frames": 9, "guidance_scale": 3.0}


def clip_of(server: Server, video_id: str) -> np.ndarray:
    data = server.http.get(f"/v1/videos/{video_id}/content").content
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_clip_over_http(ltx: Server, tiny_ltx: Path) -> None:
    wish = {**CLIP, "num_inference_steps": 3, "seed": 5, "output_quality": "maximum"}
    video_id = ltx.video(**wish)
    assert ltx.finished(video_id)["status"] == "completed"
    clip = clip_of(ltx, video_id)
    assert clip.shape == (9, 64, 96, 3)
    call = {"width": 96, "height": 64, "num_frames": 9, "guidance_scale": 3.0}
    expected = theirs(tiny_ltx, 5, num_inference_steps=3, **call)
    # Between them is an mp4, which halves the resolution of colours: in brightness the clip is that
    # of diffusers, and no other.
    other = theirs(tiny_ltx, 6, num_inference_steps=3, **call)
    apart = [float(np.abs((clip - one) @ BRIGHTNESS).mean()) for one in (expected, other)]
    assert apart[0] < 0.3 * apart[1], apart
    again = ltx.video(**wish)
    assert ltx.finished(again)["status"] == "completed"
    assert np.array_equal(clip_of(ltx, again), clip)


def test_a_running_clip_is_cancelled(ltx: Server) -> None:
    """Long before its last step; the next one does not wait for it."""
    large = {**CLIP, "size": "192x128", "num_frames": 41}
    long = ltx.video(**large, num_inference_steps=200)
    ltx.wait_until("progress", lambda: ltx.state(long)["progress"] > 0)
    assert ltx.state(long)["status"] == "in_progress"
    assert ltx.http.delete(f"/v1/videos/{long}").json()["deleted"] is True
    assert ltx.http.get(f"/v1/videos/{long}").status_code == 404
    short = ltx.video(**CLIP, num_inference_steps=2)  # diffusers' schedule of LTX has no single one
    assert ltx.finished(short)["status"] == "completed"
