"""The parts of the GPU check that go through the engine: a denoise step, and a served picture."""

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
from typing import Any

import numpy as np
import torch

from benchmarks.denoise_cases import CASES, NAMED, Case, Step, relative
from benchmarks.gpu_check import ROOT, Peers, Row, compare

STATE = ROOT / "build" / "gpu-check" / "denoise.json"
PROMPT, SEED, SIDE, STEPS = "a red cat on the beach", 11, 128, 4
START_SECONDS = 240.0


def denoise(
    cases: tuple[Case, ...] = CASES, device: str = "cuda", state: Path | None = STATE
) -> list[Row]:
    """Rows G15 to G18. A case that is done is kept in `state`: an interrupted run goes on there."""
    done: dict[str, list[Row]] = {}
    if state is not None and state.exists():
        done = json.loads(state.read_text())
    for case in cases:
        if case.name in done:
            continue
        done[case.name] = denoise_rows(case, torch.device(device))
        if state is not None:
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps(done))
    if state is not None:
        state.unlink(missing_ok=True)
    return [row for case in cases for row in done[case.name]]


def denoise_rows(case: Case, device: torch.device) -> list[Row]:
    """Milliseconds a step by everyone, and how far apart the latents are after it."""
    on_gpu = device.type == "cuda"
    step = Step(case, device, torch.bfloat16 if on_gpu else torch.float32)

    def ours(backend: str, named: bool = False) -> Any:
        step.attend(backend)
        return step.ours(named=named)

    peers: Peers = {
        "diffusers": lambda _: step.theirs(),
        "ours automatic": lambda _: ours("auto"),
    }
    if on_gpu:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def cudnn(compiled: bool) -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return step.theirs(compiled=compiled)

        peers |= {
            "diffusers cudnn": lambda _: cudnn(False),
            "diffusers cudnn compile": lambda _: cudnn(True),
            "ours sdpa": lambda _: ours("sdpa", named=True),
            "ours native": lambda _: ours("native", named=True),
            "ours triton": lambda _: ours("triton", named=True),
        }
    want = step.theirs()
    apart = {name: relative(work(0), want) for name, work in peers.items()}
    times = compare(peers, repeats=5)
    shape = f"{case.name}, {case.whole}"
    return [
        {"op": "denoise step", "shape": shape, "by": name, "ms": ms, "apart": apart[name]}
        | {"vs": {other: times[other] / ms for other in times if other != name}}
        for name, ms in times.items()
    ]


# ---- a picture from a server ----


def e2e(device: str = "cuda") -> list[Row]:
    """A picture of a small checkpoint, served with the native kernels, against diffusers' own.

    On a GPU both run in bf16 and diffusers in fp32 says what is right; random weights make much of
    every rounding, so ours may be as far from it as diffusers' bf16 is, and a little more.
    """
    from sgl_diffusion.recipes.tiny_wan import build_tiny_wan

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
