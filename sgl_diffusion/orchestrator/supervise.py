"""Keep one stage alive: start it, watch it, end it when it is silent, start it again.

One task does all of it, so there is never more than one process of a stage. A stage that is not
asked to leave has died, whatever its exit status; the pause before the next start grows until a
stage was ready for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Coroutine
from typing import Any, Protocol

from numpy.typing import NDArray

from sgl_diffusion.base.errors import SglError, from_wire
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.startup import told
from sgl_diffusion.orchestrator.limits import Health, Limits, State
from sgl_diffusion.orchestrator.messages import (
    Boot,
    Failed,
    FromStage,
    Heartbeat,
    Loading,
    Metric,
    Payload,
    Ready,
    Shutdown,
)
from sgl_diffusion.orchestrator.silence import Silence
from sgl_diffusion.orchestrator.topology import StageSpec
from sgl_diffusion.orchestrator.transport import Link, Transport

log = get_logger(__name__)


class Owner(Protocol):
    """Who is told about the stage; every call comes from the supervisor's event loop."""

    def stage_ready(self, link: Link) -> None: ...

    def stage_sent(self, message: FromStage, arrays: list[NDArray[Any]]) -> None: ...

    def stage_lost(self, reason: str, why: str) -> None:
        """It died and is started again."""

    def stage_unavailable(self, error: SglError) -> None:
        """It cannot start; it is tried again later."""


class Supervisor:
    def __init__(
        self, spec: StageSpec, transport: Transport, limits: Limits, owner: Owner, log_level: str
    ) -> None:
        self._transport = transport
        self._limits = limits
        self._owner = owner
        self._boot = Boot(
            spec.name, spec.entry, spec.config, log_level, limits.heartbeat, limits.credits
        )
        self._state: State = "loading"
        self._reason = "The model is being loaded."
        self._since = time.monotonic()
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._life: _Life | None = None
        self._task: asyncio.Task[None] | None = None
        self._deaths: deque[float] = deque()
        self._backoffs = 0
        self.card: Payload | None = None
        self.error: SglError | None = None
        self.metrics: list[Metric] = []
        self.restarts: Counter[str] = Counter()

    @property
    def state(self) -> State:
        """What the stage does; `health` also looks at how it did lately."""
        return self._state

    @property
    def loading(self) -> bool:
        """Whether there is a process that is not ready yet."""
        starting = self._life is not None and self._life.ready_at is None
        return starting or self._state == "loading"

    def replace(self, reason: str, why: str) -> None:
        """End the process; another one is started."""
        if self._life is not None:
            self._life.end(reason, why)

    def health(self) -> Health:
        state, reason = self._state, self._reason
        deaths = self._deaths_lately()
        if state in ("ready", "restarting") and deaths >= self._limits.deaths:
            minutes = self._limits.deaths_window / 60
            state = "failed"
            reason = (
                f"The worker died {deaths} times within {minutes:.0f} minutes. {reason}".strip()
            )
        seconds = time.monotonic() - self._since
        return Health(state, reason, self.restarts.total(), seconds)

    def changed(self) -> Coroutine[Any, Any, bool]:
        """Waits for the next change of state after this call."""
        return self._changed.wait()

    def start(self) -> None:
        assert self._task is None, "a supervisor is started once"
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the stage: asked first, then SIGTERM, then SIGKILL."""
        self._stopping.set()
        if self._life is not None:
            self._life.attention.set()
        if self._task is not None:
            await self._task
        self._become("stopped", "The server is stopping.")

    async def _run(self) -> None:
        while not self._stopping.is_set():
            self._life = life = _Life(self)
            await life.run()
            self._life = None
            if not self._stopping.is_set():
                await self._pause(self._mourn(life))

    def _mourn(self, life: _Life) -> float:
        """Tell the owner; returns the seconds until the next start."""
        reason, why = life.cause
        self.restarts[reason] += 1
        self.metrics = [sample for sample in self.metrics if sample.kind == "counter"]
        if life.error is not None:
            self.error = life.error
            self._become("failed", str(life.error))
            self._owner.stage_unavailable(life.error)
        else:
            self._deaths.append(time.monotonic())
            self._become("restarting", f"The worker {why}; it is being restarted.")
            self._owner.stage_lost(reason, why)
        if life.ready_at and time.monotonic() - life.ready_at >= self._limits.steady:
            self._backoffs = 0
            pause = 0.0
        else:
            longest = self._limits.backoff_most
            pause = min(self._limits.backoff_first * 2.0 ** min(self._backoffs, 16), longest)
            self._backoffs += 1
        log.error("%s %s; next start in %.0f s", life.name, why, pause)
        return pause

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            pass

    def _deaths_lately(self) -> int:
        while self._deaths and time.monotonic() - self._deaths[0] > self._limits.deaths_window:
            self._deaths.popleft()
        return len(self._deaths)

    def _become(self, state: State, reason: str = "") -> None:
        if state != self._state:
            self._since = time.monotonic()
        self._state, self._reason = state, reason
        self._changed.set()
        self._changed = asyncio.Event()


class _Life:
    """One run of the stage, from its start to its exit; the transport's `Listener`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._limits = supervisor._limits
        self._ended = False
        self._silence = Silence(self._limits)
        self._broken = False
        self.attention = asyncio.Event()
        self.ready_at: float | None = None
        self.error: SglError | None = None
        self.cause = ("", "")
        self.name = "worker"
        self._link: Link

    # -- from the transport -----------------------------------------------------------------------

    def received(self, message: FromStage, arrays: list[NDArray[Any]]) -> None:
        self._silence.heard()
        supervisor = self._supervisor
        match message:
            case Loading(note):
                log.info("%s: %s", self.name, note)
                if supervisor._state == "loading":
                    supervisor._reason = note
            case Ready(card, load_seconds, spent):
                log.info("%s: ready after %.2f s: %s", self.name, load_seconds, told(spent))
                self.ready_at = time.monotonic()
                supervisor.card, supervisor.error = card, None
                supervisor._become("ready")
                supervisor._owner.stage_ready(self._link)
            case Heartbeat(metrics, running):
                self._silence.beat(running)
                supervisor.metrics = metrics
            case Failed(error, None):
                self.error = from_wire(error)
                self.cause = ("load", f"could not start: {self.error}")
            case _:
                supervisor._owner.stage_sent(message, arrays)

    def broken(self, why: str) -> None:
        self.end("protocol", why)

    def end(self, reason: str, why: str) -> None:
        self._broken = True
        self.cause = (reason, why)
        self.attention.set()

    def exited(self, reason: str, why: str) -> None:
        self._ended = True
        # What we ended ourselves, or what announced its end, has its reason already.
        if not self.cause[0]:
            self.cause = (reason, why)
        self.attention.set()

    # -- the watch --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start the stage; returns when it is gone."""
        supervisor = self._supervisor
        try:
            self._link = supervisor._transport.open(supervisor._boot, self)
        except OSError as error:
            self.cause = ("start", f"could not be started: {error.strerror}")
            return
        self.name = self._link.name
        log.info("stage %s: %s started", supervisor._boot.stage, self.name)
        try:
            await self._watch(supervisor._stopping)
        finally:
            if not self._ended:
                self._link.kill()

    async def _watch(self, stopping: asyncio.Event) -> None:
        tick = min(1.0, self._limits.silence / 10, self._limits.load_silence / 10)
        while not self._ended and not stopping.is_set() and not self._broken:
            before = time.monotonic()
            await self._attend(tick)
            # Counted in ticks: if this process itself stood still, the stage is not to blame.
            self._silence.grows(min(time.monotonic() - before, 2 * tick), self._link.pid)
            if self._link.killable and self._too_silent():
                self.cause = ("silent", f"was silent for {self._silence.seconds:.0f} s")
                break
        # A stage that still loads does not listen.
        if stopping.is_set() and not self._ended and self.ready_at is not None:
            self._link.send(Shutdown(0.0))
            await self._exit_within(self._limits.leave)
        await self._put_down()

    async def _put_down(self) -> None:
        if not self._ended:
            self._link.terminate()
            await self._exit_within(self._limits.term)
        if not self._ended:
            self._link.kill()
            await self._exit_within(float("inf"))

    async def _exit_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._ended and (left := deadline - time.monotonic()) > 0:
            await self._attend(min(left, 60.0))

    async def _attend(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.attention.wait(), seconds)
        except TimeoutError:
            pass
        self.attention.clear()

    def _too_silent(self) -> bool:
        card = self._supervisor.card
        on_cpu = card is not None and card.get("device") == "cpu"
        return self._silence.too_long(
            self._link.pid, ready=self.ready_at is not None, on_cpu=on_cpu
        )
