"""What keeps requests fast: nothing that runs for each of them takes a thread it does not need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from sgl_diffusion.server.app import ROUTERS
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
