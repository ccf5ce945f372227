"""Waiting for answers, with an eye on the client: whoever leaves ends the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from sgl_diffusion.client.chat import ChatAnswer, ChatHandle, SoundPiece, TextPiece

Pieces = AsyncIterator[TextPiece | SoundPiece]

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


async def whole(request: Request, handle: ChatHandle) -> ChatAnswer:
    """The whole answer; giving up the wait ends the work."""
    try:
        return await unless_gone(request, handle.result())
    finally:
        handle.cancel()  # does nothing to a job that has ended


async def streamed(request: Request, handle: ChatHandle) -> Pieces:
    """The answer in pieces, of which there is one; what fails before ends the work."""
    try:
        return await unless_gone(request, begun(handle.pieces()))
    except BaseException:
        handle.cancel()
        raise


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
