"""Which arrangements of ranks there are, and which one a model gets."""

from __future__ import annotations

import pytest

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.distributed.layout import Degrees, Layout
from sgl_diffusion.distributed.shares import overlap, shares, span


def test_one_rank_is_one_layout() -> None:
    assert Degrees(1).choose(30, guided=True) == Layout()


@pytest.mark.parametrize(
    ("degrees", "heads", "guided", "layout"),
    [
        (Degrees(4, ring=2, ulysses=2), 12, True, Layout(1, 2, 2)),
        (Degrees(4), 12, True, Layout(2, 1, 2)),
        (Degrees(4), 12, False, Layout(1, 1, 4)),
        (Degrees(4), 30, False, Layout(1, 2, 2)),
        (Degrees(8), 12, False, Layout(1, 2, 4)),
        (Degrees(8, cfg=1), 12, True, Layout(1, 2, 4)),
        (Degrees(3), 30, True, Layout(1, 1, 3)),
        (Degrees(7), 12, True, Layout(1, 7, 1)),
        (Degrees(4, ring=4), 30, True, Layout(1, 4, 1)),
    ],
)
def test_the_best_layout(degrees: Degrees, heads: int, guided: bool, layout: Layout) -> None:
    assert degrees.choose(heads, guided) == layout
    assert layout.ranks == degrees.ranks


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ConfigError) as caught:
        Degrees(4, ulysses=4).choose(30, guided=False)
    assert (
        "30 attention heads" in caught.value.message and "4 Ulysses ranks" in caught.value.message
    )
    assert "1, 2, 3, 5, 6, 10, 15, 30" in caught.value.hint
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
