"""A family without a native recipe behind a real server: the same routes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.e2e.server import running_server


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_sdxl_over_http(tiny_sdxl: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    with running_server(tmp_path / "data", "--model-path", str(tiny_sdxl)) as server:
        model = server.http.get("/v1/models").json()["data"][0]
        assert model["pipeline_class"] == "StableDiffusionXLPipeline"
        assert server.http.get("/models").json()["backend"] == "diffusers"
        body = {
            "prompt": "a red fox",
            "negative_prompt": "blurry",
            "size": "48x32",
            "num_inference_steps": 3,
            "guidance_scale": 6.0,
            "seed": 9,
            "response_format": "b64_json",
        }
        answer = server.http.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        frame = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
        refused = server.http.post("/v1/images/generations", json={**body, "size": "50x32"})
        assert refused.status_code == 400 and "48 or 64" in refused.text
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red fox",
        negative_prompt="blurry",
        width=48,
        height=32,
        num_inference_steps=3,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(9),
        output_type="np",
    ).images[0]
    assert np.abs(np.asarray(frame).astype(float) - expected * 255).max() <= 1.01
