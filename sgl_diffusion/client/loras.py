"""Adapters through the client: load, set, merge, unmerge, list, forget.

Loading happens beside running jobs. A change of the set waits until the jobs before it have ended;
the jobs after it wait for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from typing import Any

import msgspec

from sgl_diffusion.base.errors import SglError, UnavailableError
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.orchestrator.coordinator import Coordinator
from sgl_diffusion.orchestrator.gate import not_in_time
from sgl_diffusion.orchestrator.messages import Payload

_ASK_AGAIN = 0.05  # seconds, while an adapter is being read


class LoraCalls:
    """`timeout` is how long a change waits for the jobs before it, in seconds, and how long the
    loading of an adapter may take. Who keeps jobs of its own in order sets `order`: entering it
    ends when those that came before the change are submitted, and later ones wait until its exit.
    """

    def __init__(self, coordinator: Coordinator, timeout: float) -> None:
        self._coordinator = coordinator
        self._timeout = timeout
        self.order: Callable[[], AbstractAsyncContextManager[None]] = nullcontext
        self._changes = 0  # asked for and not made yet
        self._report: Payload = {}
        self._report_of: Payload | None = None  # the worker's card that came before it

    async def set(self, settings: Sequence[LoraSetting], merge_mode: str = "auto") -> Payload:
        """Replace the set that all jobs have; returns what `report` would."""
        given = [dataclasses.asdict(setting) for setting in settings]
        await self._load({"settings": given})
        return await self._change("lora_set", {"settings": given, "merge_mode": merge_mode})

    async def merge(self, target: str = "all", strength: float = 1.0) -> Payload:
        """Put the set back into use, every adapter at this strength."""
        return await self._change("lora_merge", {"target": target, "strength": strength})

    async def unmerge(self, target: str = "all") -> Payload:
        """Take the set out of use: the weights are those that were loaded."""
        return await self._change("lora_unmerge", {"target": target})

    async def delete(self, nickname: str) -> Payload:
        """Forget an adapter; ConflictError while it is in use."""
        payload = {"nickname": nickname}
        if self._coordinator.replicas > 1:  # in one a job may use it: all wait for that one
            return await self._change("lora_delete", payload)
        return self._seen(await self._coordinator.control("lora_delete", payload))

    async def report(self) -> Payload:
        """The adapters and the sets, and whether a change waits."""
        return self._seen(await self._coordinator.control("lora_list", {}))

    async def prepare(self, uses: Sequence[LoraUse]) -> tuple[LoraUse, ...]:
        """Load the adapters that a job names and check that it could have them now. Returns them
        with their files: a job that runs later has these, or fails."""
        if not uses:
            return ()
        try:
            accepted = await self._load({"uses": [dataclasses.asdict(use) for use in uses]})
        except SglError as error:
            error.param = error.param and "lora"  # a job has no other argument for them
            raise
        return tuple(msgspec.convert(accepted, list[LoraUse]))

    def known(self) -> Payload:
        """What is known here without asking the worker."""
        card = self._coordinator.card()
        if card is not self._report_of:
            self._report_of = card
            self._report = dict((card or {}).get("loras", {}))
        return self._state(self._report)

    def active(self) -> list[dict[str, Any]]:
        """The set that a job without adapters of its own gets, as far as it is known here."""
        return [
            {"nickname": use["nickname"], "strength": use["strength"], "target": component}
            for component, uses in self.known().get("active", {}).items()
            for use in uses
        ]

    async def _load(self, payload: Payload) -> list[Any]:
        """Wait until the adapters are read; returns those of a job as it is accepted with them."""
        until = time.monotonic() + self._timeout
        while True:
            answers = await self._coordinator.control_all("lora_prepare", payload)
            if all(answer["ready"] for answer in answers):
                answers[0].pop("ready")
                accepted: list[Any] = answers[0].pop("uses", [])
                self._seen(answers[0])
                return accepted
            if time.monotonic() > until:
                raise UnavailableError(
                    f"The adapters were not loaded within {self._timeout:g} s.",
                    hint="A download goes on; try again later.",
                    code="lora_loading",
                )
            await asyncio.sleep(_ASK_AGAIN)

    async def _change(self, action: str, payload: Payload) -> Payload:
        began = time.monotonic()
        self._changes += 1
        try:
            async with AsyncExitStack() as stack:
                try:
                    async with asyncio.timeout(self._timeout):
                        await stack.enter_async_context(self.order())
                except TimeoutError:
                    raise not_in_time(self._timeout) from None
                left = self._timeout - round(time.monotonic() - began)
                report = await self._coordinator.change(action, payload, max(left, 0.0))
                self._seen(report)  # before the jobs that wait for it go on
        finally:
            self._changes -= 1
        return self._state(report)

    def _seen(self, report: Payload) -> Payload:
        self._report_of, self._report = self._coordinator.card(), report
        return self._state(report)

    def _state(self, report: Payload) -> Payload:
        gate = self._coordinator.gate()
        return {
            **report,
            "state": "changing" if self._changes else "ready",
            "waiting_changes": self._changes,
            "waiting_jobs": gate.held,
            "jobs_ahead": gate.ahead,
        }
