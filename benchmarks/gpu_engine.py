"""The part of the GPU check that goes through a server: pictures, against diffusers' own."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.denoise_cases import NAMED
from benchmarks.gpu_check import ROOT, Row

PROMPT, SEED, SIDE, STEPS = "a red cat on the beach", 11, 128, 4
START_SECONDS = 240.0


@dataclass(frozen=True)
class Model:
    """A small checkpoint with heads of 128 channels, and how diffusers makes a picture of it."""

    name: str
    build: Callable[[Path], Path]
    pipeline: str
    call: Mapping[str, Any]


def _build_wan(path: Path) -> Path:
    from tests.checkpoints.random_wan import build_tiny_wan

    return build_tiny_wan(path, heads=2, head_dim=128)


def _build_flux(path: Path) -> Path:
    from tests.checkpoints.tiny_flux import build

    return build(path, heads=2, head_dim=128, axes=(16, 56, 56))


MODELS = (
    Model(
        "wan",
        _build_wan,
        "WanPipeline",
        {"negative_prompt": "", "num_frames": 1, "guidance_scale": 5.0},
    ),
    Model("flux", _build_flux, "FluxPipeline", {"guidance_scale": 3.5}),
)


def e2e(device: str = "cuda") -> list[Row]:
    """A picture of each small checkpoint with an adapter, merged and as one of the request, against
    diffusers' own; on a GPU with the native kernels, and in CUDA graphs.

    There both run in bf16 and diffusers in fp32 says what is right; random weights make much of
    every rounding, so ours may be as far from it as diffusers' bf16 is, and a little more.
    """
    return [row for model in MODELS for row in _case(model, device)]


def _case(model: Model, device: str) -> list[Row]:
    on_gpu = device == "cuda"
    flags = ["--device", device, "--dit-precision", "bf16" if on_gpu else "fp32"]
    flags += ["--text-encoder-precision", "fp32", "--vae-precision", "fp32"]
    environment = {}
    if on_gpu:
        flags += ["--attention-backend", "native", "--cuda-graphs", "on"]
        environment["SGLD_OPS"] = ",".join(f"{op}={name}" for op, name in NAMED.items())
    with tempfile.TemporaryDirectory() as folder:
        path = model.build(Path(folder) / "tiny")
        ink, chalk = (
            _adapter(path, Path(folder) / f"{name}.safetensors", seed)
            for name, seed in (("ink", 3), ("chalk", 4))
        )
        flags += ["--lora-path", str(ink), "--lora-merge-mode", "merge"]
        start = time.perf_counter()
        with _server(path, Path(folder) / "data", flags, environment) as url:
            ready = time.perf_counter() - start
            merged = _made(url, 3)
            _post(f"{url}/v1/unmerge_lora_weights", {})
            own = _made(url, 3, ink)
            other = _made(url, 2, chalk)
        found = {"merged": (merged, ink), "own": (own, ink), "another own": (other, chalk)}
        plain = _diffusers(model, path, None, device, torch.float32)
        rows = []
        for name, (made, adapter) in found.items():
            want = _diffusers(model, path, adapter, device, torch.float32)
            theirs = _diffusers(model, path, adapter, device, torch.bfloat16) if on_gpu else want
            limit = psnr(theirs, want) - 3 if on_gpu else 45.0
            # Another adapter of the same layers and rank is in the graphs that are there.
            graphs = not on_gpu or (made.replays > 0 and (made.captures > 0) == (made is not other))
            rows.append(_picture_row(f"{model.name}, {name}", made, want, limit, plain, graphs))
    return [{"step": f"serve {model.name}", "seconds": ready, "result": "ready"}, *rows]


@dataclass(frozen=True)
class _Made:
    """Pictures of one request, sent several times, and what graphs did for them."""

    pictures: list[np.ndarray]
    replays: float
    captures: float


def _made(url: str, count: int, adapter: Path | None = None) -> _Made:
    names = ("sgld_graph_replays_total", "sgld_graph_captures_total")
    before = [_sample(url, name) for name in names]
    pictures = [_picture(url, adapter) for _ in range(count)]
    return _Made(pictures, *(_sample(url, n) - b for n, b in zip(names, before, strict=True)))


def _picture_row(
    name: str, made: _Made, want: np.ndarray, limit: float, plain: np.ndarray, graphs: bool
) -> Row:
    ours, without = psnr(made.pictures[0], want), psnr(plain, want)
    same = all(bool((other == made.pictures[0]).all()) for other in made.pictures)
    good = ours >= limit > without and same and graphs
    return {
        "step": f"picture of {name}",
        "psnr": ours,
        "least": limit,
        "without the adapter": without,
        "same seed, same picture": same,
        "graph replays": made.replays,
        "graphs made": made.captures,
        "result": "passed" if good else "FAILED: the picture is not that of diffusers",
    }


def _adapter(path: Path, file: Path, seed: int) -> Path:
    """A low-rank change of the attention's queries, in the names of diffusers."""
    from safetensors.torch import load_file, save_file

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for part in sorted((path / "transformer").glob("*.safetensors")):
        for name, weight in load_file(part).items():
            if name.endswith("to_q.weight"):
                layer, (out, width) = name.removesuffix(".weight"), weight.shape
                down = torch.randn(4, width, generator=generator) / width**0.5
                tensors[f"transformer.{layer}.lora_A.weight"] = down
                up = 0.5 * torch.randn(out, 4, generator=generator)
                tensors[f"transformer.{layer}.lora_B.weight"] = up
    assert tensors, f"{path} has no attention"
    save_file(tensors, file)
    return file


def _merge(transformer: Any, file: Path) -> None:
    """The adapter into the weights of diffusers, without PEFT."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    for name, down in tensors.items():
        if ".lora_A." in name:
            layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            up = tensors[name.replace("lora_A", "lora_B")]
            weight = transformer.get_submodule(layer).weight.data
            weight.copy_((weight.float().cpu() + up @ down).to(weight.dtype))


def _sample(url: str, name: str) -> float:
    """The sum of a counter of /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


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


def _picture(url: str, adapter: Path | None = None) -> np.ndarray:
    """With the adapter as one of the request's own."""
    from PIL import Image

    body: dict[str, Any] = {
        "prompt": PROMPT,
        "seed": SEED,
        "size": f"{SIDE}x{SIDE}",
        "num_inference_steps": STEPS,
        "response_format": "b64_json",
        "output_format": "png",
    }
    if adapter is not None:
        body["lora"] = [{"nickname": f"own-{adapter.stem}", "path": str(adapter)}]
    data = _post(f"{url}/v1/images/generations", body)["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data[0]["b64_json"]))).convert("RGB"))


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def _diffusers(
    model: Model, path: Path, adapter: Path | None, device: str, dtype: torch.dtype
) -> np.ndarray:
    """The same picture by diffusers, its transformer in `dtype`."""
    import diffusers

    types = {"transformer": dtype, "default": torch.float32}
    pipe = getattr(diffusers, model.pipeline).from_pretrained(path, dtype=types)
    if adapter is not None:
        _merge(pipe.transformer, adapter)
    pipe.to(device).set_progress_bar_config(disable=True)
    output = pipe(
        PROMPT,
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        **model.call,
    )
    frame = output.frames[0][0] if hasattr(output, "frames") else output.images[0]
    return np.asarray((frame * 255).round(), dtype=np.uint8)
