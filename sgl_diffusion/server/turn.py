"""The place of a change of the adapters in the queue of the videos."""

from __future__ import annotations

import asyncio


class Turn:
    """Whoever empties the queue comes to it, and stays until the change is over."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._over = asyncio.Event()

    async def come(self) -> None:
        """Wait until the videos before it are with the client."""
        await self._reached.wait()

    def end(self) -> None:
        """Made, or given up."""
        self._over.set()

    def reach(self) -> None:
        self._reached.set()

    async def ended(self) -> None:
        await self._over.wait()
