"""Batches are as large as they pay, by the sum of the latencies of all who wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.engine.costs import Costs, Share, Waiting
from sgl_diffusion.engine.denoise import ShapeKey

KEY = ShapeKey((16, 1, 8, 8), 512, 0, True)
PARAMS = ResolvedParams(
    prompt="x",
    negative_prompt="",
    width=64,
    height=64,
    num_frames=1,
    fps=16,
    num_inference_steps=10,
    guidance_scale=5.0,
    flow_shift=None,
    max_sequence_length=512,
    seeds=(1,),
)
# Seconds of a step by its rows: every row costs the same; a device that is not full; in between.
CURVES: dict[str, Callable[[int], float]] = {
    "linear": lambda rows: 0.1 * rows,
    "flat": lambda rows: 0.1,
    "half": lambda rows: 0.05 + 0.05 * rows,
    "worse": lambda rows: 0.1 * rows**1.3,
    "full at four": lambda rows: 0.1 * max(1.0, rows / 4),
}


def waiting(*rows: int) -> list[Waiting]:
    return [Waiting(PARAMS, count) for count in rows]


def latencies(costs: Costs, curve: Callable[[int], float], jobs: int, most: int) -> list[float]:
    """When each of so many equal jobs is done, if steps cost what the curve says."""
    left, now, ends = [PARAMS.num_inference_steps] * jobs, 0.0, []
    while left:
        rows = costs.share(KEY, waiting(*[1] * len(left)), most).rows
        now += curve(rows)
        costs.add(KEY, [PARAMS] * rows, curve(rows))
        left = [steps - 1 for steps in left[:rows]] + left[rows:]
        ends += [now] * left.count(0)
        left = [steps for steps in left if steps]
    return ends


class Always(Costs):
    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def share(
        self, key: ShapeKey, waiting: Sequence[Waiting], most: int, lanes: int = 1, company: int = 0
    ) -> Share:
        return Share(min(self._size, most, len(waiting)))


@pytest.mark.parametrize("jobs", [2, 3, 8, 13])
@pytest.mark.parametrize("name", CURVES)
def test_the_sum_of_latencies_is_that_of_the_best_size(name: str, jobs: int) -> None:
    curve, costs = CURVES[name], Costs()
    latencies(costs, curve, jobs, 8)  # it has seen such work before
    ours = sum(latencies(costs, curve, jobs, 8))
    single = sum(latencies(Always(1), curve, jobs, 8))
    full = sum(latencies(Always(8), curve, jobs, 8))
    # One step of another size, to learn, may be among them.
    assert ours <= min(single, full) * 1.03


def test_unknown_costs_are_tried_out_largest_first() -> None:
    costs = Costs()
    assert costs.share(KEY, waiting(1, 1, 1), 8).rows == 3
    costs.add(KEY, [PARAMS] * 3, 0.3)
    assert costs.share(KEY, waiting(1, 1, 1), 8).rows == 1


def test_rows_of_one_job_stay_together_unless_there_are_too_many() -> None:
    costs = Costs()
    for rows in range(1, 9):
        costs.add(KEY, [PARAMS] * rows, CURVES["linear"](rows))
    assert costs.share(KEY, waiting(3, 1, 2), 8).rows == 3
    assert costs.share(KEY, waiting(10), 8).rows == 8


def test_a_little_noise_does_not_change_the_size() -> None:
    costs = Costs()
    for rows in range(1, 5):
        costs.add(KEY, [PARAMS] * rows, CURVES["flat"](rows))
    assert costs.share(KEY, waiting(1, 1, 1, 1), 4).rows == 4
    for _ in range(9):
        costs.add(KEY, [PARAMS] * 4, 0.104)
    assert costs.share(KEY, waiting(1, 1, 1, 1), 4).rows == 4


def test_one_slow_step_is_not_believed() -> None:
    costs = Costs()
    for seconds in (0.1, 0.1, 9.0):
        costs.add(KEY, [PARAMS] * 1, seconds)
    assert costs.seconds(KEY, 1) == 0.1


def test_a_size_that_was_slow_once_is_tried_again_after_a_while() -> None:
    costs = Costs()
    costs.add(KEY, [PARAMS] * 1, 0.1)
    costs.add(KEY, [PARAMS] * 4, 9.0)  # as if something was compiled in it
    taken = []
    for _ in range(3000):
        taken.append(costs.share(KEY, waiting(1, 1, 1, 1), 4).rows)
        costs.add(KEY, [PARAMS] * taken[-1], 0.1)
    assert taken[:900] == [1] * 900 and taken[-900:] == [4] * 900


def test_a_job_is_estimated_from_steps_of_any_size() -> None:
    costs = Costs()
    assert costs.estimate(PARAMS) == 0
    costs.add(KEY, [PARAMS] * 2, 0.4)
    assert costs.estimate(PARAMS) == pytest.approx(0.2 * PARAMS.num_inference_steps)


def in_lanes(costs: Costs, alone: float, shared: float, jobs: int) -> Share:
    """What is chosen where a step takes so long with all threads, and so long in one of two lanes,
    for each of its rows."""
    for rows in (1, jobs):
        costs.add(KEY, [PARAMS] * rows, alone * rows)
        costs.add(KEY, [PARAMS] * rows, shared * rows, lanes=2)
    return costs.share(KEY, waiting(*[1] * jobs), 8, lanes=2)


@pytest.mark.parametrize("jobs", [2, 3, 8])
def test_lanes_are_for_steps_that_gain_little_from_more_threads(jobs: int) -> None:
    assert in_lanes(Costs(), 0.9, 1.0, jobs) == Share(1, 2)
    assert in_lanes(Costs(), 0.5, 1.0, jobs) == Share(1, 1)


def test_the_more_wait_the_less_must_lanes_gain() -> None:
    """Two jobs, one after the other: 0.6 + 1.2 seconds; side by side 1 + 1. Of eight the last one
    would wait for 4.8 seconds, or for 4."""
    assert in_lanes(Costs(), 0.6, 1.0, 2) == Share(1, 1)
    assert in_lanes(Costs(), 0.6, 1.0, 8) == Share(1, 2)


def test_who_waits_elsewhere_is_company() -> None:
    costs = Costs()
    assert in_lanes(costs, 0.9, 1.0, 2).lanes == 2
    assert costs.share(KEY, waiting(1), 8, lanes=2, company=1) == Share(1, 2)
    assert costs.share(KEY, waiting(1), 8, lanes=2) == Share(1, 1)
    assert costs.share(KEY, waiting(1), 8, lanes=1, company=5) == Share(1, 1)


def test_both_kinds_of_steps_are_tried() -> None:
    costs, taken = Costs(), []
    for _ in range(20):
        share = costs.share(KEY, waiting(1, 1), 1, lanes=2)
        taken.append(share.lanes)
        costs.add(KEY, [PARAMS], 0.5 if share.lanes == 1 else 1.0, share.lanes)
    assert taken[0] == 2 and set(taken[2:]) == {1}
    assert costs.seconds(KEY, 1) == 0.5 and costs.seconds(KEY, 1, lanes=2) == 1.0
