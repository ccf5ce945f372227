"""Which arrangements of ranks there are, and which one a model gets."""

from __future__ import annotations

import dataclasses

import pytest

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.distributed.layout import Degrees, Layout
from sgl_diffusion.distributed.plan import COSTS, Work, plan, step_seconds
from sgl_diffusion.distributed.shares import overlap, shares, span


def work(heads: int, guided: bool) -> Work:
    return Work(tokens=32760, heads=heads, head_dim=128, blocks=30, guided=guided)


def chosen(degrees: Degrees, heads: int, guided: bool) -> Layout:
    return plan(degrees.fitting(heads), work(heads, guided), COSTS["cuda"]).layout


def test_one_rank_is_one_layout() -> None:
    assert chosen(Degrees(1), 30, guided=True) == Layout()


@pytest.mark.parametrize(
    ("degrees", "heads", "guided", "layout"),
    [
        (Degrees(4, ring=2, ulysses=2), 12, True, Layout(1, 2, 2)),
        (Degrees(4), 12, True, Layout(2, 1, 2)),
        (Degrees(4), 12, False, Layout(1, 1, 4)),
        (Degrees(4), 40, False, Layout(1, 1, 4)),
        (Degrees(8), 12, False, Layout(1, 2, 4)),
        (Degrees(8), 12, True, Layout(2, 1, 4)),
        (Degrees(8, cfg=1), 12, True, Layout(1, 2, 4)),
        (Degrees(8, ulysses=8), 12, False, Layout(1, 1, 8)),
        (Degrees(3), 30, False, Layout(1, 1, 3)),
        (Degrees(7), 12, True, Layout(1, 1, 7)),
        (Degrees(4, ring=4), 30, True, Layout(1, 4, 1)),
    ],
)
def test_the_best_layout(degrees: Degrees, heads: int, guided: bool, layout: Layout) -> None:
    assert chosen(degrees, heads, guided) == layout
    assert layout.ranks == degrees.ranks


@pytest.mark.parametrize("device", COSTS)
def test_the_reckoning(device: str) -> None:
    """More ranks make a long sequence faster and a short one slower; what idles costs."""
    costs, long = COSTS[device], work(12, guided=False)
    short = dataclasses.replace(long, tokens=16, head_dim=8)
    assert step_seconds(Layout(1, 1, 4), long, costs) < step_seconds(Layout(), long, costs)
    assert step_seconds(Layout(1, 1, 4), short, costs) > step_seconds(Layout(), short, costs)
    assert step_seconds(Layout(2, 1, 2), long, costs) > step_seconds(Layout(1, 1, 4), long, costs)
    few = dataclasses.replace(
        long, heads=9
    )  # two heads for one of eight ranks, two for four of five
    gain = step_seconds(Layout(1, 1, 5), few, costs) / step_seconds(Layout(1, 1, 8), few, costs)
    assert 1 < gain < 1.25


def test_a_plan_says_what_and_why() -> None:
    text = str(plan(Degrees(4).fitting(12), work(12, guided=True), COSTS["cpu"]))
    assert text.startswith("cfg 2 x ring 1 x ulysses 2, ")
    assert "s a step by the table of costs; next best: cfg " in text
    alone = str(plan([Layout(1, 2, 2)], work(12, guided=True), COSTS["cpu"]))
    assert "next best" not in alone


def test_more_ranks_than_heads() -> None:
    with pytest.raises(ConfigError) as caught:
        Degrees(8, ulysses=8).fitting(6)
    assert "6 attention heads" in caught.value.message and "8 Ulysses ranks" in caught.value.message
    assert "1 to 6, best those that divide it: 1, 2, 3, 6;" in caught.value.hint
    assert caught.value.param == "ulysses_degree"


@pytest.mark.parametrize(
    "degrees", [Degrees(4, ulysses=3), Degrees(4, ring=2, ulysses=4), Degrees(1, ulysses=2)]
)
def test_degrees_that_do_not_multiply_to_the_ranks(degrees: Degrees) -> None:
    with pytest.raises(ConfigError, match="cannot be arranged") as caught:
        degrees.layouts()
    assert "multiply to --num-gpus" in caught.value.hint


def test_guidance_has_two_branches() -> None:
    with pytest.raises(ConfigError, match="2 branches"):
        Degrees(4, cfg=4).layouts()


@pytest.mark.parametrize(("length", "ranks"), [(4, 4), (5, 4), (17, 4), (4095, 7), (3, 2)])
def test_shares_cover_everything_once(length: int, ranks: int) -> None:
    parts = shares(length, ranks)
    assert sum(parts) == length and max(parts) - min(parts) <= 1
    taken = [i for rank in range(ranks) for i in range(length)[span(length, ranks, rank)]]
    assert taken == list(range(length))


def test_overlap_counts_from_the_part() -> None:
    assert overlap(slice(0, 7), slice(5, 10)) == slice(0, 2)
    assert overlap(slice(7, 20), slice(5, 10)) == slice(2, 5)
    assert overlap(slice(0, 5), slice(5, 10)) == slice(0, 0)
