"""Load for bench_serving.py: requests of the OpenAI SDK, in closed and open loops."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import openai

from benchmarks.processes import tree_seconds
from benchmarks.serving_stream import Told

SUBJECTS = ("cat", "castle", "river", "robot", "boat", "owl", "train", "forest")
SIZES = ("128x128", "128x128", "160x96", "96x160")
POLL_SECONDS = 0.05
FILMS = 2  # of which the times are known at the end of a mixed load
PATIENCE = 900.0  # seconds for one load: what takes longer has come to a stop


class LoadError(Exception):
    """A request was not answered, and nothing was measured."""


@dataclass(frozen=True)
class Shot:
    """One finished request, in seconds. `queue` is the part of `total` in which nothing was done
    for it: what is left beside the time that the server says it worked. Of a streamed one `begun`
    is when the server said that it had begun, and `preview` when its first partial picture came."""

    total: float
    pictures: int
    queue: float | None = None
    begun: float | None = None
    preview: float | None = None


@dataclass(frozen=True)
class Load:
    """What a server made of one load. `films` are the videos beside its requests, `company` further
    requests, which only kept these from being alone: they count as work, not as times."""

    shots: list[Shot]
    wall: float
    cpu: float
    films: Sequence[Shot] = ()
    company: Sequence[Shot] = ()

    def row(self) -> dict[str, Any]:
        pictures = sum(shot.pictures for shot in (*self.shots, *self.company))
        videos = {"videos": len(self.films)} if self.films else {}
        return {
            "requests": len(self.shots),
            "pictures_per_s": pictures / self.wall,
            "pictures_per_cpu_s": pictures / self.cpu,
            **_spread("total", [shot.total for shot in self.shots]),
            **_spread("queue", [s.queue for s in self.shots if s.queue is not None]),
            **_spread("preview", [s.preview for s in self.shots if s.preview is not None]),
            **_spread("stream_queue", [s.begun for s in self.shots if s.begun is not None]),
            **videos,
            **_spread("video", [film.total for film in self.films]),
        }


def _spread(name: str, values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"{name}_p{percent}": cuts[percent - 1] for percent in (50, 95, 99)}


@asynccontextmanager
async def sdk(address: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=600
    ) as client:
        yield client


def wishes(count: int | None = None, *, previews: bool) -> Iterator[dict[str, Any]]:
    """The same requests for every server: sizes, steps, guidance, seeds and outputs mixed. Every
    fourth one asks for a partial picture, where the server has them. Without a count they do not
    end."""
    draw = random.Random(7)
    for number in itertools.count() if count is None else range(count):
        words = draw.sample(SUBJECTS, 2)
        wish = {
            "prompt": f"a {words[0]} and a {words[1]}, number {number}",
            "size": draw.choice(SIZES),
            "n": draw.choice((1, 1, 1, 2)),
            "extra_body": {
                "num_inference_steps": draw.choice((6, 8, 12)),
                "guidance_scale": draw.choice((3.0, 5.0, 7.5)),
                "seed": draw.randrange(2**31),
            },
        }
        if previews and number % 4 == 3:
            wish |= {"stream": True, "partial_images": 1}
        yield wish


async def picture(client: openai.AsyncOpenAI, wish: dict[str, Any]) -> Shot:
    begin = time.perf_counter()
    if wish.get("stream"):
        return await _streamed(client, wish, begin)
    answer = await client.images.generate(response_format="b64_json", **wish)
    total = time.perf_counter() - begin
    assert answer.data is not None and len(answer.data) == wish["n"]
    worked = float((answer.model_extra or {})["inference_time_s"])
    return Shot(total, wish["n"], queue=max(0.0, total - worked))


async def _streamed(client: openai.AsyncOpenAI, wish: dict[str, Any], begin: float) -> Shot:
    """The lines themselves: the SDK's events leave out what the server says in comments."""
    told = Told()
    async with client.images.with_streaming_response.generate(**wish) as answer:
        async for line in answer.iter_lines():
            told.line(line, time.perf_counter() - begin)
    total = time.perf_counter() - begin
    if told.error or told.done != wish["n"] or told.begun is None or told.preview is None:
        raise LoadError(f"a stream that is not whole: {told}")
    return Shot(total, told.done, begun=told.begun, preview=told.preview)


async def video(client: openai.AsyncOpenAI, prompt: str, **fields: Any) -> Shot:
    """Made, polled until it is done, and fetched."""
    begin = time.perf_counter()
    made = await client.videos.create(prompt=prompt, extra_body=fields)
    while made.status != "completed":
        if made.status not in ("queued", "in_progress"):
            raise LoadError(f"video {made.id} is {made.status}: {made.error}")
        await asyncio.sleep(POLL_SECONDS)
        made = await client.videos.retrieve(made.id)
    content = await client.videos.download_content(made.id)
    assert content.content[4:8] == b"ftyp"
    return Shot(time.perf_counter() - begin, fields["num_frames"])


async def closed(
    address: str, pid: int, concurrency: int, requests: int, *, previews: bool
) -> Load:
    """So many clients, each sending its next request when the last one is answered."""
    todo = wishes(requests, previews=previews)
    shots: list[Shot] = []

    async def ask(client: openai.AsyncOpenAI) -> None:
        for wish in todo:
            shots.append(await picture(client, wish))

    return await _measured(address, pid, shots, lambda c: [ask(c) for _ in range(concurrency)])


async def open_loop(address: str, pid: int, rate: float, requests: int, *, previews: bool) -> Load:
    """Requests come at random moments, so many a second, whoever is still waiting."""
    draw = random.Random(11)
    shots: list[Shot] = []
    at, due = 0.0, []
    for wish in wishes(requests, previews=previews):
        at += draw.expovariate(rate)
        due.append((at, wish))

    async def ask(client: openai.AsyncOpenAI, after: float, wish: dict[str, Any]) -> None:
        await asyncio.sleep(after)
        shots.append(await picture(client, wish))

    return await _measured(address, pid, shots, lambda c: [ask(c, *each) for each in due])


async def beside_videos(
    address: str, pid: int, concurrency: int, requests: int, clip: dict[str, Any], *, previews: bool
) -> Load:
    """Short requests, while one long video after the other is made; the shots are the short ones'.

    It begins when the first video is under way. After `requests` short ones it goes on until there
    are two videos that had company to their end; the times are those of the first ones.
    """
    todo = wishes(previews=previews)
    shots: list[Shot] = []
    films: list[Shot] = []
    company: list[Shot] = []
    asked = 0
    over = asyncio.Event()

    async def make(client: openai.AsyncOpenAI) -> None:
        while not over.is_set():
            film = await video(client, "a train in the snow", **clip)
            if not over.is_set():
                films.append(film)

    async def ask(client: openai.AsyncOpenAI) -> None:
        nonlocal asked
        while asked < requests or len(films) < FILMS:
            asked += 1
            kept = shots if asked <= requests else company
            kept.append(await picture(client, {**next(todo), "n": 1}))

    async def shorts(client: openai.AsyncOpenAI) -> None:
        await asyncio.sleep(POLL_SECONDS)
        await asyncio.gather(*(ask(client) for _ in range(concurrency)))
        over.set()

    load = await _measured(address, pid, shots, lambda c: [make(c), shorts(c)])
    return replace(load, films=films, company=company)


async def _measured(
    address: str,
    pid: int,
    shots: list[Shot],
    work: Callable[[openai.AsyncOpenAI], list[Coroutine[None, None, None]]],
) -> Load:
    """All requests answered within `PATIENCE`; the first that fails ends the load."""
    async with sdk(address) as client:
        begin, cpu = time.perf_counter(), tree_seconds(pid)
        try:
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
                for each in work(client):
                    tasks.create_task(each)
        except TimeoutError:
            late = f"not done after {PATIENCE:g} s, with {len(shots)} answers"
            raise LoadError(f"the load on {address} is {late}") from None
        except ExceptionGroup as failed:
            raise LoadError(f"the load on {address} failed: {failed.exceptions[0]}") from failed
        return Load(shots, time.perf_counter() - begin, tree_seconds(pid) - cpu)
