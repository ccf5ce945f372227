"""What goes on beside the steps: which errands begin there, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from sgl_diffusion.base.log import get_logger
from sgl_diffusion.engine.beside import Beside
from sgl_diffusion.engine.errand import Errand, Outcome
from sgl_diffusion.engine.errands import Errands
from sgl_diffusion.engine.failures import is_out_of_memory
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.lanes import Done
from sgl_diffusion.engine.lineup import Batch, Decode, Encode, Offer, Unit, lane_of, next_to_encode
from sgl_diffusion.engine.shared import Shared

log = get_logger(__name__)

_LOOK_UP_SECONDS = 0.005  # while there is only work in other threads
_POLL_SECONDS = 1.0


class Overlap:
    """Of each group so many `rows` hold their prompts."""

    def __init__(
        self,
        shared: Shared,
        beside: Beside,
        errands: Errands,
        take: Callable[[Errand, object], object],
        rows: int,
    ) -> None:
        self._shared = shared
        self._room = shared.sizes.room
        self._beside = beside
        self._errands = errands
        self._take = take
        self._rows = rows
        self.crowded = False  # there was no memory for it

    @property
    def busy(self) -> bool:
        return self._beside.busy

    def wait(self, steps: Sequence[Future[Done]]) -> None:
        """A moment, or until something is done, here or of these steps in lanes."""
        self._beside.wait(_LOOK_UP_SECONDS, steps)

    def send(self, jobs: Sequence[Job]) -> None:
        """Begin what there is room for; jobs come by urgency."""
        if self._beside.free("encode") and (new := next_to_encode(jobs, self._rows)):
            self._begin(Encode(new), jobs)
        done = next((job for job in jobs if job.to_decode and not job.away), None)
        if done is not None and self._beside.free("decode"):
            self._begin(Decode(done), jobs)

    def unit(self, offer: Offer, jobs: Sequence[Job]) -> Unit:
        """What is done at this group's turn: steps, as long as there are any, and what else there
        is goes on beside them."""
        if offer.beside is not None and (
            isinstance(offer.next, Batch) or self._fits(offer.next, jobs)
        ):
            return offer.beside
        return offer.next

    def takes(self, unit: Unit, jobs: Sequence[Job]) -> bool:
        """Whether it goes on beside the steps without having a turn."""
        if isinstance(unit, Batch) or (isinstance(unit, Encode) and unit.job.blend is not None):
            return False
        return self._fits(unit, jobs)

    def gives_way(self, unit: Encode | Decode) -> bool:
        """Whether this unit can be done in the steps' thread; if not, it soon can. Two at a time
        would share what a VAE or a tokenizer remembers between two calls."""
        lane = lane_of(unit)
        self._beside.hurry(lane)
        return self._beside.free(lane)

    def drop(self, job: Job) -> None:
        """Nobody waits for this job any more."""
        if job.away:
            self._beside.hurry(job.away)

    def collect(self) -> bool:
        """Take over what is done; whether there was anything."""
        outcomes = self._beside.collect()
        for outcome in outcomes:
            job = outcome.errand.job
            job.away = ""
            if self._shared.jobs.get(job.id) is job:
                self._take_over(outcome)
        return bool(outcomes)

    def settle(self, poll: Callable[[], None]) -> None:
        """Until nothing goes on here."""
        self._beside.hurry("decode")
        while self._beside.busy:
            self._beside.wait(_POLL_SECONDS)
            self.collect()
            poll()

    def _fits(self, unit: Encode | Decode, jobs: Sequence[Job]) -> bool:
        """Whether this unit has its place beside the steps, now or when its lane is free."""
        return not self._beside.free(lane_of(unit)) or self._room.lane(jobs, unit.job)

    def _begin(self, unit: Encode | Decode, jobs: Sequence[Job]) -> None:
        """If the memory suffices for it beside a step."""
        if not self._room.lane(jobs, unit.job):
            return
        errand = self._errands.of(unit)
        errand.job.away = errand.lane
        self._beside.start(errand)

    def _take_over(self, outcome: Outcome) -> None:
        errand, job = outcome.errand, outcome.errand.job
        if outcome.error is None:
            self._shared.accounts.spend([job], errand.lane, outcome.seconds, beside=True)
            self._take(errand, outcome.result)
        elif is_out_of_memory(outcome.error):
            errand.undo()
            self.give_up()
        else:
            self._shared.fail([job], outcome.error)

    def give_up(self) -> None:
        log.warning("out of memory: from now on nothing is done beside the steps")
        self.crowded = True
