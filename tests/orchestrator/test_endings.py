"""What a job that was given up tells its owner."""

from __future__ import annotations

import asyncio

from sgl_diffusion.base.errors import OutOfMemoryError, WorkerLostError
from sgl_diffusion.orchestrator import endings
from sgl_diffusion.orchestrator.job import Job
from sgl_diffusion.orchestrator.messages import Progress
from sgl_diffusion.orchestrator.suspects import accuse


def test_a_job_that_kills_workers_is_told_where() -> None:
    async def story() -> tuple[Job, Job]:
        begun, silent = (Job(name, {}, 0.0, lambda _: 0) for name in "ab")
        begun.advance(Progress("a", 7, 20, "denoise"))
        assert accuse([begun], 2) == []
        begun.advance(Progress("a", 9, 20, "denoise"))
        assert accuse([begun], 2) == [begun]
        accuse([silent], 1)
        return begun, silent

    begun, silent = asyncio.run(story())
    told = endings.worker_lost("signal", "was killed by signal 6 (SIGABRT)", begun)
    assert isinstance(told, WorkerLostError)
    assert told.message == (
        "The worker was killed by signal 6 (SIGABRT) at step 9 of 20, in the last of 2 attempts; "
        "it is started again without the job."
    )
    slow = endings.worker_lost("silent", "was silent for 121 s", silent)
    assert "--worker-timeout" in (slow.hint or "")
    short = endings.worker_lost("memory", "was killed by signal 9", silent)
    assert isinstance(short, OutOfMemoryError) and "while it had the job" in short.message
