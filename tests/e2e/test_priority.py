"""From the `priority` of a request to its share of the steps, by the order of the steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import groupby

import pytest

from sgl_diffusion.base.params import DEFAULT_PRIORITY
from sgl_diffusion.engine.lineup import _MOST_WEIGHT
from tests.e2e.server import Server, running_server

pytestmark = pytest.mark.timeout(600)

# A step of one takes as long as a step of the other, but they share none.
SIZES = ("64x48", "48x64")
STEPS = 200  # the most that a request may have
SWITCHES = 5
FIRST, LAST = 3, 16  # clips of priority 9 and of priority 0
# Three clips of priority 9 are more than a group may count for; sixteen of priority 0 are half a
# clip of usual priority.
SHARE = _MOST_WEIGHT / (LAST * 2.0**-DEFAULT_PRIORITY)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One unit of work at a time: a lane that the first group leaves free is anybody's."""
    folder = tmp_path_factory.mktemp("priority") / "data"
    with running_server(folder, "--no-overlap") as running:
        yield running


class Crowd:
    """Clips of one size and priority, of which always so many are unfinished."""

    def __init__(self, server: Server, clips: int, size: str, priority: int) -> None:
        self.size, self._most = size, clips
        self._server = server
        self._wish = {"size": size, "priority": priority, "num_inference_steps": STEPS}
        self._clips: set[str] = set()
        self.top_up()

    def top_up(self) -> None:
        listed = self._server.http.get("/v1/videos", params={"limit": 100}).json()["data"]
        ended = {video["id"] for video in listed if video["status"] in ("completed", "failed")}
        self._clips -= ended
        while len(self._clips) < self._most:
            self._clips.add(self._server.video(**self._wish, num_frames=5))

    def steps(self) -> float:
        """Denoise steps of its size until now."""
        label = f'size="{self.size}x5"'
        counts = self._server.metrics().items()
        return sum(n for name, n in counts if "step_seconds_count" in name and label in name)

    def leave(self) -> None:
        for clip in self._clips:
            assert self._server.http.delete(f"/v1/videos/{clip}").status_code == 200


def recorded(server: Server, one: Crowd, other: Crowd, more: int) -> list[str]:
    """The sizes of the steps in their order, while both are there, until each has made more."""
    assert server.http.post("/start_profile").status_code == 200
    goals = [(crowd, crowd.steps() + more) for crowd in (one, other)]

    def enough() -> bool:
        one.top_up()
        other.top_up()
        return all(crowd.steps() >= goal for crowd, goal in goals)

    server.wait_until("both move", enough, 300)
    events = server.http.post("/stop_profile").json()["traceEvents"]
    steps = sorted((e for e in events if e["name"] == "denoise"), key=lambda e: e["ts"])
    return [step["args"]["size"].removesuffix("x5") for step in steps]


@pytest.mark.parametrize(("first", "last"), [SIZES, SIZES[::-1]])
def test_the_first_gets_more_and_the_last_moves(server: Server, first: str, last: str) -> None:
    """Runs of steps, until the other group has its turn. A step that the machine holds up makes the
    next run of the other group long, so it is the median of the runs that counts."""
    crowds = Crowd(server, LAST, last, 0), Crowd(server, FIRST, first, 9)
    runs: dict[str, list[int]] = {first: [], last: []}
    try:
        while len(runs[last]) < SWITCHES:
            order = recorded(server, *crowds, more=SWITCHES)
            whole = [(size, len(list(steps))) for size, steps in groupby(order)][1:-1]
            for size, steps in whole:
                runs[size].append(steps)
    finally:
        for crowd in crowds:
            crowd.leave()
    ratio = statistics.median(runs[first]) / statistics.median(runs[last])
    assert SHARE / 4 <= ratio <= SHARE * 4, runs
