"""What bench_serving.py does where a server does not answer: it says so, and ends."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks import serving_load
from benchmarks.plain_server import Lanes, make_app


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_clip_that_the_peer_cannot_make_is_failed(tiny_wan_a: Path, tmp_path: Path) -> None:
    app = make_app(Lanes(str(tiny_wan_a), 1), 1, tmp_path)

    async def ask(size: str) -> serving_load.Shot:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with (
            http,
            openai.AsyncOpenAI(base_url="http://peer/v1", api_key="-", http_client=http) as client,
        ):
            wish = {"size": size, "num_frames": 5, "num_inference_steps": 1}
            return await asyncio.wait_for(serving_load.video(client, "a cat", **wish), 120)

    assert asyncio.run(ask("32x32")).pictures == 5
    with pytest.raises(serving_load.LoadError, match="is failed: .*divisible by 16"):
        asyncio.run(ask("40x40"))


def test_a_load_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def refused() -> None:
        raise serving_load.LoadError("video 7 is failed")

    def load(*work: object) -> None:
        address, shots = "http://127.0.0.1:9", []
        asyncio.run(
            serving_load._measured(address, os.getpid(), shots, lambda _: [each() for each in work])
        )

    with pytest.raises(serving_load.LoadError, match="127.0.0.1:9 failed: video 7 is failed"):
        load(never, refused)
    monkeypatch.setattr(serving_load, "PATIENCE", 0.05)
    with pytest.raises(serving_load.LoadError, match="not done after 0.05 s, with 0 answers"):
        load(never)
