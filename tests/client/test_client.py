"""The client over both transports: cards, parameters, generations."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sgl_diffusion.base.errors import EngineError, RequestError, UnavailableError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.client.client import Client
from tests.client.painter import CARD, painter_app
from tests.orchestrator.play import QUICK, children, until

BOTH = pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])


def play(
    scenario: Callable[[Client], Awaitable[None]],
    *,
    in_process: bool = False,
    ready: bool = True,
    max_queue: int = 8,
    **config: Any,
) -> None:
    async def story() -> None:
        client = Client(
            painter_app(**config), in_process=in_process, limits=QUICK, max_queue=max_queue
        )
        await client.start()
        try:
            if ready:
                await client.ready()
            await scenario(client)
        finally:
            await client.stop()
        assert client.health().state == "stopped"
        assert client.card() is None or client.card() == CARD

    asyncio.run(story())
    assert children() == []


@BOTH
def test_a_generation_has_one_clip_per_seed(in_process: bool) -> None:
    async def scenario(client: Client) -> None:
        wish = SamplingParams(prompt="a", num_outputs=2, seed=(7, 300), num_inference_steps=4)
        params = client.resolve(wish, video=True)
        handle = await client.submit(params, job_id="mine", deadline=30.0)
        assert handle.id == "mine" and handle.params == params
        steps = [e.snapshot.step async for e in handle.events() if e.kind == "progress"]
        assert steps == sorted(steps) and steps[-1] == 4
        made = await handle.result()
        assert (made.job_id, made.params, made.attempt) == ("mine", params, 1)
        assert made.seconds == {"work": 0.5}
        assert [clip.shape for clip in made.clips] == [(5, 16, 32, 3)] * 2
        assert [int(clip.min()) for clip in made.clips] == [7, 300 % 256]
        assert made.frames is made.clips[0]
        images = made.images()
        assert len(images) == 10 and images[0].size == (32, 16)
        assert images[9].getpixel((31, 15)) == (44, 44, 44)
        assert handle.snapshot().progress == 100

    play(scenario, in_process=in_process)


def test_nothing_can_be_resolved_before_the_card_is_known() -> None:
    async def scenario(client: Client) -> None:
        assert client.card() is None
        assert client.health().state == "loading"
        with pytest.raises(UnavailableError, match="loaded|reading"):
            client.resolve(SamplingParams(prompt="a"), video=False)
        await client.ready()
        assert client.card() == CARD
        assert client.card() is client.card()
        with pytest.raises(RequestError, match="prompt is empty"):
            client.resolve(SamplingParams(prompt=" "), video=False)

    play(scenario, ready=False, load_sleep=0.2)


def test_the_card_is_kept_while_the_worker_restarts() -> None:
    async def scenario(client: Client) -> None:
        os.kill(children()[0], signal.SIGKILL)
        await until(lambda: client.health().state == "restarting")
        params = client.resolve(SamplingParams(prompt="a"), video=False)
        made = await (await client.submit(params)).result()
        assert made.clips[0].shape == (1, 16, 32, 3)
        assert client.health().restarts == 1
        restarts = [m for m in client.metrics() if m.name == "worker_restarts_total"]
        assert [(m.labels, m.value) for m in restarts] == [({"reason": "signal"}, 1)]

    play(scenario, load_sleep=0.3)


@BOTH
def test_an_answer_that_does_not_fit_the_question_is_an_error(in_process: bool) -> None:
    async def scenario(client: Client) -> None:
        params = client.resolve(SamplingParams(prompt="a", num_outputs=2), video=False)
        with pytest.raises(EngineError, match="for 2 outputs"):
            await (await client.submit(params)).result()

    play(scenario, in_process=in_process, mistake=1)


@BOTH
def test_cancel_by_id_and_by_handle(in_process: bool) -> None:
    async def scenario(client: Client) -> None:
        params = client.resolve(SamplingParams(prompt="a", num_inference_steps=200), video=False)
        first, second = await client.submit(params), await client.submit(params)
        assert client.cancel(first.id) and second.cancel()
        assert not client.cancel(first.id) and not client.cancel("nobody")
        for handle in (first, second):
            with pytest.raises(EngineError) as caught:
                await handle.result()
            assert caught.value.code == "cancelled"
        answer = await client.control("look")
        assert answer["running"] == 0

    play(scenario, in_process=in_process, sleep=0.02)
