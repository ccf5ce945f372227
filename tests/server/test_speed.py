"""What keeps requests fast: nothing that runs for each of them takes a thread it does not need."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from sgl_diffusion.server import flights
from sgl_diffusion.server.app import ROUTERS
from sgl_diffusion.server.repeats import Origin
from sgl_diffusion.server.rows import own_rows
from sgl_diffusion.server.validate import check_query


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    if dependant.call is not None:
        yield dependant.call
    for inner in dependant.dependencies:
        yield from _calls(inner)


def test_no_route_or_dependency_takes_a_thread() -> None:
    """The framework runs plain functions in threads: each costs a request more than a poll does."""
    routes = [route for router in ROUTERS for route in router.routes]
    assert routes and all(isinstance(route, APIRoute) for route in routes)
    calls = {call for route in routes for call in _calls(route.dependant)}  # type: ignore[attr-defined]
    calls |= {check_query, own_rows}  # the app adds these to all
    assert len(calls) > 30
    assert not [call.__name__ for call in calls if not inspect.iscoroutinefunction(call)]


def test_an_answer_is_found_without_a_look_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    over = flights._Flight.over

    def counted(flight: flights._Flight) -> bool:
        nonlocal looks
        looks += 1
        return over(flight)

    async def story() -> tuple[int, int]:
        kept, asker = flights.Flights(), _Patient()

        async def ask(name: str) -> int:
            before = looks
            origin = Origin("a", name, False, name)
            await kept.answer(asker, origin, lambda: make(name))  # type: ignore[arg-type]
            return looks - before

        async def make(name: str) -> dict[str, Any]:
            return {"data": []}

        first = await ask("0")
        for number in range(1, 60):
            await ask(str(number))
        return first, await ask("7")

    monkeypatch.setattr(flights._Flight, "over", counted)
    first, later = asyncio.run(story())
    assert looks > 60 and later <= first + 2


class _Patient:
    """As much of a request as a flight looks at; it never hangs up."""

    async def receive(self) -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError
