"""A client that does what the real one does, without a model: real arrays, progress, errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from sgl_diffusion.base.errors import (
    CancelledError,
    SglError,
    UnavailableError,
)
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults, SamplingParams
from sgl_diffusion.client.types import Event, Generation, Health, Snapshot
from sgl_diffusion.orchestrator.job import JobOutput
from sgl_diffusion.orchestrator.jobstore import JobStore
from sgl_diffusion.orchestrator.messages import Metric
from sgl_diffusion.server.app import create_app
from sgl_diffusion.server.connection import connection_class
from sgl_diffusion.server.context import Settings

CARD = ModelCard(
    name="tiny",
    path="/models/tiny-wan",
    family="wan",
    pipeline_class="WanPipeline",
    backend="native",
    tasks=("T2V", "T2I"),
    defaults=SamplingDefaults(
        width=64, height=48, num_inference_steps=4, guidance_scale=5.0, num_frames=17, fps=16
    ),
    edits="image-to-image",
    max_images=1,
    masks=True,
    previews=True,
)


def picture_of(params: ResolvedParams, seed: int) -> np.ndarray:
    """A smooth clip that depends on the seed, so that lossy files can be compared with it."""
    rows = np.linspace(0, 200, params.height)[None, :, None, None]
    columns = np.linspace(0, 50, params.width)[None, None, :, None]
    clip = np.broadcast_to(
        rows + columns + seed % 5, (params.num_frames, params.height, params.width, 3)
    )
    return clip.astype(np.uint8)


class FakeHandle:
    def __init__(self, client: FakeClient, job_id: str, params: ResolvedParams) -> None:
        self.id, self.params, self._client = job_id, params, client
        self._step, self._error, self._begun = 0, None, False
        self._done, self._moved = asyncio.Event(), asyncio.Condition()
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._client.gate.wait()
        self._begun = True
        for _ in range(self.params.num_inference_steps):
            if self._client.turns is None:
                await asyncio.sleep(self._client.step_seconds)
            else:
                await self._client.turns.acquire()
            async with self._moved:
                self._step += 1
                self._moved.notify_all()
        await self._end(self._client.fail_with)

    async def _end(self, error: SglError | None) -> None:
        async with self._moved:
            if not self._done.is_set():
                self._error = error
                self._done.set()
            self._moved.notify_all()

    def snapshot(self) -> Snapshot:
        total = self.params.num_inference_steps
        state = "in_progress" if self._begun else "queued"
        if self._done.is_set():
            state = "failed" if self._error else "completed"
        percent = 100 if state == "completed" else min(99, 100 * self._step // total)
        return Snapshot(
            self.id, state, percent, self._step, total, "denoise", self._client.attempt,
            None if self._begun else 0,
        )  # fmt: skip

    async def events(self) -> AsyncIterator[Event]:
        seen, shown = -1, 0
        while not self._done.is_set():
            async with self._moved:
                while self._step == seen and not self._done.is_set():
                    await self._moved.wait()
            seen = self._step
            if not self._done.is_set():
                yield Event("progress", self.snapshot())
            if self._error is None:
                for event in self._parts(shown, seen):
                    yield event
                shown = seen
        if self._error is None:  # the last steps may have been quicker than the reader
            for event in self._parts(shown, self._step):
                yield event
        yield Event("failed" if self._error else "done", self.snapshot(), None, self._error)

    def _parts(self, done: int, now: int) -> Iterator[Event]:
        """After each of the first steps a picture of each output, darker than the final one."""
        for step in range(done + 1, min(now, self.params.partial_images) + 1):
            for row, seed in enumerate(self.params.seeds):
                clip = picture_of(self.params, seed) // 2
                meta = {"partial": step - 1, "row": row, "step": step}
                yield Event("output", self.snapshot(), JobOutput([clip], meta))

    async def result(self) -> Generation:
        await self._done.wait()
        if self._error is not None:
            raise self._error
        clips = [picture_of(self.params, seed) for seed in self.params.seeds]
        return Generation(self.id, self.params, clips, {"denoise": 0.5, "decode": 0.25}, 1)

    def cancel(self) -> bool:
        if self._done.is_set():
            return False
        self._error = CancelledError("The job was cancelled.")
        self._done.set()
        self._task.cancel()
        self._client.cancelled.append(self.id)
        self._wake = asyncio.create_task(self._end(None))
        return True


class FakeLoras:
    """Writes down what it is asked, and answers as the real one does."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail_with: SglError | None = None
        self.state: dict[str, Any] = {"loaded_adapters": [], "active": {}, "state": "ready"}

    async def set(self, settings: Any, merge_mode: str = "auto") -> dict[str, Any]:
        return self._do("set", (settings, merge_mode))

    async def merge(self, target: str = "all", strength: float = 1.0) -> dict[str, Any]:
        return self._do("merge", (target, strength))

    async def unmerge(self, target: str = "all") -> dict[str, Any]:
        return self._do("unmerge", target)

    async def delete(self, nickname: str) -> dict[str, Any]:
        return self._do("delete", nickname)

    async def report(self) -> dict[str, Any]:
        return self._do("report", None)

    async def prepare(self, uses: Any) -> Any:
        if uses:
            self._do("prepare", uses)
        return uses

    def known(self) -> dict[str, Any]:
        return self.state

    def active(self) -> list[dict[str, Any]]:
        return []

    def _do(self, what: str, how: Any) -> dict[str, Any]:
        self.calls.append((what, how))
        if self.fail_with is not None:
            raise self.fail_with
        return self.state


class FakeClient:
    """`gate` holds jobs back, with `turns` every step takes one, `fail_with` ends them, `state` is
    what health says."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.step_seconds = 0.0
        self.turns: asyncio.Semaphore | None = None
        self.fail_with: SglError | None = None
        self.refuse_with: Exception | None = None
        self.state = "ready"
        self.attempt = 1
        self.model = CARD
        self.cancelled: list[str] = []
        self.submitted: list[ResolvedParams] = []
        self.handles: dict[str, FakeHandle] = {}
        self.loaded = True
        self.loras = FakeLoras()

    def card(self) -> ModelCard | None:
        return self.model if self.loaded else None

    def health(self) -> Health:
        return Health(self.state, "" if self.state == "ready" else "loading weights", 0, 1.0)

    def metrics(self) -> list[Metric]:
        return [
            Metric("denoise_forwards_total", 3, {"rows": "2"}),
            Metric("denoise_forwards_total", 7, {"rows": "1"}),
            Metric("running", 1, {}, "gauge"),
        ]

    def resolve(self, wish: SamplingParams, *, video: bool) -> ResolvedParams:
        if not self.loaded:
            raise UnavailableError("The model is loading.")
        return self.model.resolve(wish, video=video)

    async def submit(
        self,
        params: ResolvedParams,
        *,
        job_id: str | None = None,
        deadline: float | None = None,
        attempt: int = 1,
        asked: Any = None,
    ) -> FakeHandle:
        if self.refuse_with is not None:
            raise self.refuse_with
        assert job_id is not None and deadline is not None and deadline > 0
        former = self.handles.get(job_id)
        assert former is None or former.snapshot().state == "failed", (
            "an unfinished job has that id"
        )
        self.submitted.append(params)
        self.handles[job_id] = FakeHandle(self, job_id, params)
        return self.handles[job_id]


class Api:
    """The app in a loop of its own thread; calls block, so tests are plain functions."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.folder = folder
        self._settings = Settings(data_dir=folder, **settings)
        self.run(self._open())

    async def _open(self) -> None:
        self.client = FakeClient()
        self.jobs = await JobStore.open(self.folder)
        self.app = create_app(self.client, self.jobs, self._settings)  # type: ignore[arg-type]
        self.context = self.app.state.context
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1:30000"
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a plain function inside the loop: asyncio objects belong to it."""

        async def inside() -> Any:
            return function()

        return self.run(inside())

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.run(self.http.request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def until(self, what: Callable[[], Any], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, "it did not come true in time"
            time.sleep(0.02)

    def wait_for(self, video_id: str, *states: str) -> dict[str, Any]:
        seen: list[dict[str, Any]] = []

        def look() -> bool:
            seen.append(self.get(f"/v1/videos/{video_id}").json())
            return seen[-1]["status"] in states

        self.until(look)
        return seen[-1]

    def close(self) -> None:
        async def close() -> None:
            await self.http.aclose()
            await self._lifespan.__aexit__(None, None, None)
            for handle in self.client.handles.values():
                handle.cancel()
            await self.jobs.close()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self.run(close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def make_api(tmp_path: Path) -> Iterator[Callable[..., Api]]:
    made: list[Api] = []

    def make(**settings: Any) -> Api:
        made.append(Api(tmp_path, **settings))
        return made[-1]

    yield make
    for api in made:
        if not api.loop.is_closed():
            api.close()


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api()


@pytest.fixture
def base_url(api: Api) -> Iterator[str]:
    """The same app behind a real socket."""
    with listening(api) as url:
        yield url


@contextmanager
def listening(api: Api) -> Iterator[str]:
    """Serve `api` on a free port."""
    config = uvicorn.Config(
        api.app,
        port=0,
        http=connection_class(api.context.settings.limits, api.context.rejected),
        ws="none",
        lifespan="off",
        log_config=None,
    )
    server = uvicorn.Server(config)
    server.config.load()
    done = asyncio.run_coroutine_threadsafe(server._serve(), api.loop)
    while not server.started:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = server.force_exit = True
        done.result(10)
