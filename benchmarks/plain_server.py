"""The usual way to serve a diffusers pipeline: FastAPI in front, a thread that runs it behind.

    python benchmarks/plain_server.py --model-path FOLDER [--lanes 1] [--threads 2]

It is the peer of bench_serving.py, and tuned as far as its design goes: inference mode, all outputs
of a request in one call, embeddings of prompts kept, files encoded beside the next request by the
encoders that our server uses, and `lanes` pipelines over the same weights, each with a share of the
threads. A request has a lane to itself from its first step to its last.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import copy
import functools
import queue
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse

from sgl_diffusion.server.media import IMAGE_QUALITY, VIDEO_QUALITY, encode_image, encode_video

MOST_PROMPTS = 256  # embeddings that are kept
STEPS, GUIDANCE, FPS = 8, 5.0, 16


class Lanes:
    """Pipelines over one set of weights; whoever has one has it alone."""

    def __init__(self, model: str, lanes: int) -> None:
        from diffusers import WanPipeline

        first = WanPipeline.from_pretrained(model, dtype=torch.float32)
        self._embed = functools.lru_cache(MOST_PROMPTS)(self._embed_now)
        self._tokenizing = threading.Lock()  # a tokenizer serves one thread at a time
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(lanes):
            parts = dict(first.components)
            parts["scheduler"] = type(first.scheduler).from_config(first.scheduler.config)
            parts["vae"] = copy.deepcopy(first.vae)  # it keeps frames while it decodes
            pipeline = WanPipeline(**parts)
            pipeline.set_progress_bar_config(disable=True)
            self._free.put(pipeline)
        self._encoder = WanPipeline(**first.components)

    @torch.inference_mode()
    def _embed_now(self, prompt: str) -> torch.Tensor:
        with self._tokenizing:
            embedded, _ = self._encoder.encode_prompt(prompt, do_classifier_free_guidance=False)
        return embedded

    @torch.inference_mode()
    def run(self, wish: dict[str, Any], frames: int, outputs: int) -> tuple[Any, float]:
        """Clips uint8 [outputs, F, H, W, 3] and the seconds they took."""
        width, height = (int(edge) for edge in wish["size"].split("x"))
        seed = int(wish.get("seed", 42))
        prompt, negative = (
            self._embed(wish.get(name, "")).expand(outputs, -1, -1)
            for name in ("prompt", "negative_prompt")
        )
        pipeline = self._free.get()
        start = time.perf_counter()
        try:
            clips = pipeline(
                prompt_embeds=prompt,
                negative_prompt_embeds=negative,
                width=width,
                height=height,
                num_frames=frames,
                num_inference_steps=int(wish.get("num_inference_steps", STEPS)),
                guidance_scale=float(wish.get("guidance_scale", GUIDANCE)),
                generator=[torch.Generator().manual_seed(seed + i) for i in range(outputs)],
                output_type="np",
            ).frames
        finally:
            self._free.put(pipeline)
        pixels = (np.asarray(clips) * 255).round().astype(np.uint8)
        return pixels, time.perf_counter() - start


def make_app(lanes: Lanes, count: int, folder: Path) -> FastAPI:
    app = FastAPI()
    work, encode = ThreadPoolExecutor(count), ThreadPoolExecutor(2)
    videos: dict[str, dict[str, Any]] = {}
    tasks: set[asyncio.Task[None]] = set()

    def png(picture: Any) -> str:
        return base64.b64encode(encode_image(picture, "png", IMAGE_QUALITY, None)).decode()

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    async def images(request: Request) -> JSONResponse:
        wish, loop = await request.json(), asyncio.get_running_loop()
        count = int(wish.get("n", 1))
        clips, seconds = await loop.run_in_executor(work, lanes.run, wish, 1, count)
        texts = await asyncio.gather(
            *(loop.run_in_executor(encode, png, clip[0]) for clip in clips)
        )
        data = [{"b64_json": text} for text in texts]
        body = {"created": int(time.time()), "data": data, "inference_time_s": seconds}
        return JSONResponse(body)

    async def make_video(video: dict[str, Any], wish: dict[str, Any]) -> None:
        try:
            await write_video(video, wish)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            message = f"{type(error).__name__}: {error}"
            video |= {"status": "failed", "error": {"code": "failed", "message": message}}
        else:
            video["status"] = "completed"

    async def write_video(video: dict[str, Any], wish: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        frames = int(wish["num_frames"])
        clips, video["inference_time_s"] = await loop.run_in_executor(
            work, lanes.run, wish, frames, 1
        )
        write = functools.partial(encode_video, fps=FPS, quality=VIDEO_QUALITY)
        await loop.run_in_executor(encode, write, clips[0], folder / f"{video['id']}.mp4")

    @app.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:
        form = request.headers["content-type"].startswith("multipart")
        wish = dict(await request.form()) if form else await request.json()
        video = {"id": uuid.uuid4().hex, "object": "video", "status": "in_progress"}
        videos[video["id"]] = video
        task = asyncio.create_task(make_video(video, wish))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return video

    @app.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> dict[str, Any]:
        return videos[video_id]

    @app.get("/v1/videos/{video_id}/content")
    async def content(video_id: str) -> FileResponse:
        return FileResponse(folder / f"{video_id}.mp4")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each lane")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lanes = Lanes(options.model_path, options.lanes)
    warm = {"prompt": "warm-up", "size": "64x64", "num_inference_steps": 1}
    for _ in range(options.lanes):
        lanes.run(warm, 1, 1)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as port:
        app = make_app(lanes, options.lanes, Path(folder))
        print(f"http://127.0.0.1:{port.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        server.run(sockets=[port])


if __name__ == "__main__":
    main()
