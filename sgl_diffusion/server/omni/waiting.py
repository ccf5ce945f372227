"""Waiting for answers, with an eye on the client: whoever leaves ends the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request

T = TypeVar("T")

CLIENT_GONE = 499
_PATIENCE = 5.0


class GoneError(Exception):
    """The client has left."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; GoneError as soon as the client leaves, and the work is cancelled. The
    body of the request is read before, so what comes next can only be the end."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def begun(source: AsyncIterator[T]) -> AsyncIterator[T]:
    """`source` after its first item: what fails before it can still be an answer of its own. If
    nothing comes for some seconds, the wait goes on inside."""
    first = asyncio.ensure_future(_next(source))
    try:
        await asyncio.wait({first}, timeout=_PATIENCE)
    except asyncio.CancelledError:
        first.cancel()
        raise
    if first.done():
        first.result()
    return _with_first(first, source)


async def _next(source: AsyncIterator[T]) -> list[T]:
    try:
        return [await anext(source)]
    except StopAsyncIteration:
        return []


async def _with_first(first: asyncio.Future[list[T]], source: AsyncIterator[T]) -> AsyncIterator[T]:
    try:
        for item in await first:
            yield item
        async for item in source:
            yield item
    finally:
        first.cancel()
