"""When a shape becomes a graph, and which graphs are kept."""

from __future__ import annotations

import pytest

from sgl_diffusion.engine.graphs.plan import (
    EAGER_STEPS,
    LAUNCH_SECONDS,
    Plan,
    copies_pay,
    pays,
)


@pytest.mark.parametrize(
    ("seconds", "kernels", "good"),
    [
        (0.004, 600, True),  # 7 microseconds each: the device waits for the host
        (0.5, 1500, False),  # 330 each: the host is far ahead
        (100 * LAUNCH_SECONDS, 100, False),
        (0.004, 0, False),  # not counted
    ],
)
def test_graphs_pay_where_kernels_are_short(seconds: float, kernels: int, good: bool) -> None:
    assert pays(seconds, kernels) is good


def steps(plan: Plan[str], key: str, seconds: list[float], kernels: int = 100) -> None:
    for one in seconds:
        if plan.counts(key):
            plan.counted(key, kernels)
        plan.ran(key, one)


def test_a_shape_is_due_after_its_first_steps() -> None:
    plan: Plan[str] = Plan(100, always=True)
    for _ in range(EAGER_STEPS):
        assert not plan.due("a")
        plan.ran("a", 1.0)
    assert plan.due("a") and not plan.due("b")
    plan.put("a", "graph", 10)
    assert not plan.due("a") and plan.get("a") == "graph" and plan.get("b") is None


@pytest.mark.parametrize(("last", "due"), [(1e-3, True), (1e-2, False)])
def test_only_what_pays_is_due_by_itself(last: float, due: bool) -> None:
    """The first step, in which things are compiled, and the counted one are not believed."""
    plan: Plan[str] = Plan(100)
    steps(plan, "a", [9.0, 1e-4, last])
    assert plan.due("a") is due


def test_the_kernels_are_counted_once() -> None:
    plan: Plan[str] = Plan(100)
    asked = []
    for _ in range(5):
        asked.append(plan.counts("a"))
        plan.ran("a", 1.0)
    assert asked == [False, True, False, False, False]


def test_the_graph_used_longest_ago_makes_room() -> None:
    plan: Plan[str] = Plan(100)
    assert [plan.put(key, key, 40) for key in "ab"] == [0, 0]
    assert plan.get("a") == "a"
    assert plan.put("c", "c", 30) == 1
    assert [plan.get(key) for key in "abc"] == ["a", None, "c"] and plan.bytes == 70
    assert plan.put("d", "d", 100) == 2 and len(plan) == 1


def test_a_graph_that_never_fits_is_not_made_again() -> None:
    plan: Plan[str] = Plan(100, always=True)
    steps(plan, "a", [1.0] * EAGER_STEPS)
    assert plan.due("a") and plan.put("a", "a", 101) == 0
    assert len(plan) == 0 and not plan.due("a")


def test_what_cannot_be_captured_stays_eager() -> None:
    plan: Plan[str] = Plan(100, always=True)
    steps(plan, "a", [1.0] * EAGER_STEPS)
    plan.refuse("a")
    steps(plan, "a", [1.0] * EAGER_STEPS)
    assert not plan.due("a")


@pytest.mark.parametrize(
    ("rank", "width", "good"),
    [
        (16, 3072, True),  # half a megabyte a layer: copied in less than a launch
        (64, 5120, True),
        (1024, 5120, False),  # as large as the layer itself
    ],
)
def test_adapters_are_copied_where_that_takes_less_than_launches(
    rank: int, width: int, good: bool
) -> None:
    layers, nbytes = 300, rank * width * (2 + 4)
    assert copies_pay(layers * nbytes, layers) is good
    assert Plan(1 << 40).takes_adapters(8, layers * nbytes, layers) is good
    assert Plan(1 << 40, always=True).takes_adapters(8, layers * nbytes, layers)
    assert not Plan(15 * layers * nbytes, always=True).takes_adapters(8, layers * nbytes, layers)


def test_what_graphs_share_is_counted_once_and_goes_last() -> None:
    plan: Plan[str] = Plan(100)
    plan.share("adapters", "tensors", 30)
    assert plan.put("a", "a", 30, "adapters") == plan.put("b", "b", 30, "adapters") == 0
    assert plan.bytes == 90 and len(plan) == 2 and plan.shared("adapters") == "tensors"
    assert plan.get("a") == "a"
    assert plan.put("c", "c", 30) == 1 and plan.get("b") is None
    assert plan.put("d", "d", 50) == 1 and plan.get("a") is None
    assert plan.shared("adapters") is None and plan.get("c") == "c"
    assert plan.share("others", "tensors", 40) == 1 and len(plan) == 1


def test_a_graph_that_does_not_fit_beside_what_it_reads_is_not_made_again() -> None:
    plan: Plan[str] = Plan(100, always=True)
    steps(plan, "a", [1.0] * EAGER_STEPS)
    plan.share("adapters", "tensors", 50)
    assert plan.put("a", "a", 51, "adapters") == 0
    assert len(plan) == 0 and not plan.due("a") and plan.shared("adapters") == "tensors"
