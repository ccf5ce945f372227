"""A real omni server: the app on a socket, the tiny model in a thread of this process."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from sgl_diffusion.apps.omni import omni_app
from sgl_diffusion.base.omni import OmniServeOptions
from sgl_diffusion.client.chat import ChatClient
from sgl_diffusion.server.connection import connection_class
from sgl_diffusion.server.omni.app import create_omni_app
from sgl_diffusion.server.omni.settings import omni_settings
from tests.ar.chats import make_media


class OmniApi:
    """The server in a loop of its own thread; calls block, so tests are plain functions."""

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.options = OmniServeOptions(model_path=str(model), device="cpu", **options)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._open())
        self.url = f"http://127.0.0.1:{self._port}"
        self.http = httpx.Client(base_url=self.url, timeout=300)

    async def _open(self) -> None:
        self.client = ChatClient(
            omni_app(self.options), in_process=True, max_queue=self.options.max_queue
        )
        settings = omni_settings(self.options, self.folder)
        self.app = create_omni_app(self.client, settings, self.options)
        self.context = self.app.state.context
        config = uvicorn.Config(
            self.app,
            port=0,
            http=connection_class(settings.limits, self.context.rejected),
            ws="none",
            log_config=None,
        )
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        await self.client.start()
        await self.client.ready()
        self._serving = asyncio.ensure_future(self._server._serve())
        while not self._server.started:
            assert not self._serving.done()
            await asyncio.sleep(0.01)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 300) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def chat(self, content: Any = "a red fox", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
        return self.http.post("/v1/chat/completions", json={**body, "max_tokens": 12, **fields})

    def chunks(self, content: Any = "a red fox", **fields: Any) -> list[dict[str, Any]]:
        return chunks_of(self.chat(content, stream=True, **fields))

    def unfinished(self) -> int:
        return len(self.client._coordinator._jobs)

    def wait_until(self, what: str, check: Callable[[], Any], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        found = [line.rpartition(" ") for line in lines if line.startswith(f"sgld_{name}")]
        return sum(float(value) for _, _, value in found)

    def close(self) -> None:
        self.http.close()

        async def close() -> None:
            self._server.should_exit = True
            await self._serving
            await self.client.stop()

        self.run(close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream that ends as it should."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.splitlines() if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_media(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def omni(
    tiny_qwen3_omni: Path, clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OmniApi]:
    folder = tmp_path_factory.mktemp("omni")
    roots = str(clips["image"].parent)
    api = OmniApi(tiny_qwen3_omni, folder, allowed_media_path=roots, media_urls="off")
    yield api
    assert list(folder.iterdir()) == [], "the media of requests go with them"
    api.close()
