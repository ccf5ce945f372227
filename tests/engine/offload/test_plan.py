"""Which components stay away under which budget."""

from __future__ import annotations

import random

import pytest

from sgl_diffusion.engine.offload.plan import DIT, TEXT, VAE, Part, choose, model_bytes, ways

PARTS = [
    Part(TEXT, 1000, 150),
    Part(TEXT, 200, 90),
    Part(DIT, 2400, 300),
    Part(VAE, 160, 60),
    Part(None, 10, 10),
]
TILES = (0, 512, 256)


def job(edge: int) -> float:
    return {0: 500.0, 512: 300.0, 256: 200.0}[edge]


@pytest.mark.parametrize(
    ("most", "options", "edge"),
    [
        (5000, (), 0),
        (4270, (), 0),
        (4269, (TEXT,), 0),
        (3310, (TEXT,), 0),
        (3309, (TEXT, VAE), 0),
        (3209, (TEXT,), 512),
        (3109, (TEXT,), 256),
        (3009, (TEXT, VAE), 256),
        (2909, (DIT,), 0),
        (2069, (TEXT, DIT), 0),
        (1200, (TEXT, VAE, DIT), 0),
        (810, (TEXT, VAE, DIT), 256),
    ],
)
def test_the_cheapest_way_that_fits(most: int, options: tuple[str, ...], edge: int) -> None:
    found = choose(PARTS, (), TILES, job, most)
    assert found is not None and (found.options, found.tile_edge) == (options, edge)
    assert found.need <= most


def test_nothing_fits() -> None:
    assert choose(PARTS, (), TILES, job, 809) is None


def test_what_the_operator_names_is_on_in_every_way() -> None:
    found = choose(PARTS, (DIT,), TILES, job, 10_000)
    assert found is not None and found.options == (DIT,)
    assert all(DIT in way.options for way in ways(PARTS, (DIT,), TILES, job))
    # An option without a component of its kind is none of the ways.
    assert {way.options for way in ways(PARTS[:1], (), (0,), job)} == {(), (TEXT,)}


def test_no_cheaper_way_was_passed_over() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        parts = [
            Part(option, draw.randrange(2000), draw.randrange(500)) for option in (TEXT, VAE, DIT)
        ]
        most = draw.randrange(6000)
        found = choose(parts, (), TILES, job, most)
        before = ways(parts, (), TILES, job)
        fitting = [
            way for way in before if model_bytes(parts, way.options) + job(way.tile_edge) <= most
        ]
        assert found == (fitting[0] if fitting else None)
