"""The parts of bench_serving.py: what a load measures on a real server, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import serving_load as load
from benchmarks.harness import RESULTS
from benchmarks.serving_runs import RATIOS, bars, medians, record
from benchmarks.serving_stream import Told
from tests.e2e.server import Server, running_server

SAVED = sorted(RESULTS.glob("cpu-*-serving.json"))
CLIP = {"size": "64x48", "num_frames": 5, "num_inference_steps": 2}
SPREAD = ("p50", "p95", "p99")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("serving") / "data") as running:
        yield running


def saved(what: str) -> set[str]:
    """The fields that every saved row of a load of ours has."""
    rows = [row for path in SAVED for row in json.loads(path.read_text())["rows"]]
    mine = [row for row in rows if row["load"] == what and row["server"] == "ours"]
    assert mine
    return set.intersection(*(set(row) for row in mine)) - {"server", "load", "clients", "run"}


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
def test_a_mixed_load_times_the_videos_and_the_streams(server: Server) -> None:
    made = asyncio.run(
        load.beside_videos(server.url, server.process.pid, 4, 12, CLIP, previews=True)
    )
    row = made.row()
    assert row.keys() >= saved("mixed")
    assert row["requests"] == len(made.shots) == 12
    assert row["pictures_per_s"] == pytest.approx((12 + len(made.company)) / made.wall)
    assert row["videos"] == len(made.films) >= load.FILMS
    assert all(film.pictures == CLIP["num_frames"] for film in made.films)
    for name in ("total", "queue", "preview", "stream_queue", "video"):
        figures = [row[f"{name}_{part}"] for part in SPREAD]
        assert 0 <= figures[0] <= figures[1] <= figures[2], name
    streamed = [shot for shot in made.shots if shot.preview is not None]
    assert len(streamed) == 3
    for shot in streamed:
        assert shot.begun is not None and shot.queue is None
        assert 0 < shot.begun <= shot.preview < shot.total


def test_a_closed_load_keeps_its_fields(server: Server) -> None:
    made = asyncio.run(load.closed(server.url, server.process.pid, 2, 8, previews=True))
    row = made.row()
    assert row.keys() >= saved("closed") and row["requests"] == 8
    assert not any(key.startswith("video") for key in row)
    assert sum(shot.pictures for shot in made.shots) == sum(
        wish["n"] for wish in load.wishes(8, previews=True)
    )


def test_wishes_are_the_same_for_every_server_and_do_not_end() -> None:
    endless = load.wishes(previews=True)
    twenty = [next(endless) for _ in range(20)]
    assert twenty == list(load.wishes(20, previews=True))
    plain = list(load.wishes(20, previews=False))
    assert [wish["prompt"] for wish in plain] == [wish["prompt"] for wish in twenty]
    assert sum("stream" in wish for wish in twenty) == 5
    assert not any("stream" in wish for wish in plain)


def told(*lines: str) -> Told:
    story = Told()
    for second, line in enumerate(lines, 1):
        story.line(line, float(second))
    return story


def event(name: str) -> str:
    return f"data: {json.dumps({'type': f'image_generation.{name}'})}"


def test_a_stream_begins_with_its_first_step() -> None:
    place, step = ': {"queue_position": 2, "eta_s": 3}', ': {"step": 0, "steps": 8, "eta_s": 1}'
    partial, whole = event("partial_image"), event("completed")
    lines = (place, "", ": ping", place, step, partial, step, partial, whole, whole)
    assert told(*lines) == Told(begun=5.0, preview=6.0, done=2)
    assert told(place, ": ping", partial, whole) == Told(begun=3.0, preview=3.0, done=1)
    assert told(place, whole) == Told(begun=2.0, done=1)
    broken = told(step, "event: error", 'data: {"error": {"code": "worker_lost"}}')
    assert broken.error and broken.done == 0


def rows(factor: float) -> list[dict[str, Any]]:
    """Ours has `factor` in every figure, the peers have 2 and 4."""
    worth = {"ours": factor, "one": 2.0, "plain": 4.0}
    figures = {key for key, *_ in RATIOS.values()}
    return [
        {"server": name, "load": kind, "clients": clients} | dict.fromkeys(figures, value)
        for name, value in worth.items()
        for kind, clients in (("closed", 1), ("closed", 8), ("mixed", 4))
    ]


def run(factor: float, peer: str) -> dict[str, Any]:
    made = rows(factor)
    return {"peer": peer, "seconds": 1, "rows": made, "bars": bars(made)}


def test_bars_are_ratios_of_ours_to_each_peer() -> None:
    found = bars(rows(6.0))
    assert found.keys() == RATIOS.keys()
    assert all(value == (1.5 if "plain" in name else 3.0) for name, value in found.items())
    with pytest.raises(ValueError, match="not enough values"):
        bars([row for row in rows(6.0) if row["server"] != "one"])


def test_several_runs_give_medians_and_keep_each() -> None:
    runs = [run(2.0, "plain2"), run(100.0, "plain1"), run(6.0, "plain2")]
    made = record({"date": "today"}, runs)
    assert made["bars"] == medians([each["bars"] for each in runs]) == bars(rows(6.0))
    assert [each["bars"] for each in made["runs"]] == [each["bars"] for each in runs]
    assert [each["peer"] for each in made["runs"]] == ["plain2", "plain1", "plain2"]
    assert made["peer"] == "plain1 and plain2"
    for number, each in enumerate(runs, 1):
        kept = [row for row in made["rows"] if row["run"] == number]
        assert [{k: v for k, v in row.items() if k != "run"} for row in kept] == each["rows"]


def test_one_run_has_the_fields_that_were_saved_before() -> None:
    made = record({"date": "today"}, [run(6.0, "plain2")])
    for path in SAVED:
        before = json.loads(path.read_text())
        assert made.keys() >= before.keys() and made["bars"].keys() >= before["bars"].keys()
    assert made["peer"] == "plain2" and made["benchmark"] == "serving"
    assert len(made["runs"]) == 1
