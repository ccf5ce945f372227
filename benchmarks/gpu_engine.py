"""The part of the GPU check that goes through a server: a picture, against diffusers' own."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks.denoise_cases import NAMED
from benchmarks.gpu_check import ROOT, Row

PROMPT, SEED, SIDE, STEPS = "a red cat on the beach", 11, 128, 4
START_SECONDS = 240.0


def e2e(device: str = "cuda") -> list[Row]:
    """A picture of a small checkpoint, served with the native kernels, against diffusers' own.

    On a GPU both run in bf16 and diffusers in fp32 says what is right; random weights make much of
    every rounding, so ours may be as far from it as diffusers' bf16 is, and a little more.
    """
    from tests.checkpoints.random_wan import build_tiny_wan

    on_gpu = device == "cuda"
    flags = ["--device", device, "--dit-precision", "bf16" if on_gpu else "fp32"]
    flags += ["--text-encoder-precision", "fp32", "--vae-precision", "fp32"]
    environment = {}
    if on_gpu:
        flags += ["--attention-backend", "native"]
        environment["SGLD_OPS"] = ",".join(f"{op}={name}" for op, name in NAMED.items())
    with tempfile.TemporaryDirectory() as folder:
        path = build_tiny_wan(Path(folder) / "tiny", heads=2, head_dim=64)
        start = time.perf_counter()
        with _server(path, Path(folder) / "data", flags, environment) as url:
            ready = time.perf_counter() - start
            picture = _picture(url)
            again = _picture(url)
        want = _diffusers(path, device, torch.float32)
        theirs = _diffusers(path, device, torch.bfloat16) if on_gpu else want
    ours, limit = psnr(picture, want), psnr(theirs, want) - 3 if on_gpu else 45.0
    same = bool((picture == again).all())
    good = ours >= limit and same
    return [
        {"step": "serve", "seconds": ready, "result": "ready"},
        {
            "step": "picture",
            "psnr": ours,
            "least": limit,
            "same seed, same picture": same,
            "result": "passed" if good else "FAILED: the picture is not that of diffusers",
        },
    ]


def psnr(got: np.ndarray, want: np.ndarray) -> float:
    """Decibels; 100 for equal pictures."""
    error = float(((got.astype(float) - want.astype(float)) ** 2).mean())
    return 100.0 if error == 0 else float(10 * np.log10(255**2 / error))


@contextmanager
def _server(path: Path, data: Path, flags: list[str], environment: dict[str, str]) -> Iterator[str]:
    """The address of a server that is ready."""
    command = [sys.executable, "-m", "sgl_diffusion.cli", "serve", "--port", "0"]
    command += ["--model-path", str(path), "--data-dir", str(data), *flags]
    log = data.with_name("server.log")
    with log.open("w") as errors:
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert server.stdout is not None
        found = re.match(r"(http://\S+)", server.stdout.readline())
        assert found, log.read_text()
        _wait_ready(found[1], log)
        yield found[1]
    finally:
        server.terminate()
        server.wait(60)
        if server.stdout is not None:
            server.stdout.close()


def _wait_ready(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready in {START_SECONDS} s\n{log.read_text()[-4000:]}")


def _picture(url: str) -> np.ndarray:
    from PIL import Image

    body = {
        "prompt": PROMPT,
        "seed": SEED,
        "size": f"{SIDE}x{SIDE}",
        "num_inference_steps": STEPS,
        "response_format": "b64_json",
        "output_format": "png",
    }
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        encoded = json.loads(answer.read())["data"][0]["b64_json"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def _diffusers(path: Path, device: str, dtype: torch.dtype) -> np.ndarray:
    """The same picture by diffusers, its transformer in `dtype`."""
    from diffusers import WanPipeline

    types = {"transformer": dtype, "default": torch.float32}
    pipe = WanPipeline.from_pretrained(path, dtype=types).to(device)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        PROMPT,
        negative_prompt="",
        width=SIDE,
        height=SIDE,
        num_frames=1,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).frames[0]
    return np.asarray((frames[0] * 255).round(), dtype=np.uint8)
