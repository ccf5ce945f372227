"""Who is to blame for the death of a worker.

Every job in a worker that dies is a suspect. Suspects run again one at a time, with nothing beside
them (`replicas.assign`), so a second death has one possible cause: that job is given up, and its
companions are not.
"""

from __future__ import annotations

from collections.abc import Collection

from sgl_diffusion.orchestrator.job import Job


def accuse(jobs: Collection[Job], most: int) -> list[Job]:
    """Charge the jobs that were sent to a worker that died; returns those that are given up.

    A job is given up when it was alone in the worker and has used `most` attempts. Jobs that had
    not begun are innocent, unless nobody else is to blame.
    """
    suspects = [job for job in jobs if job.begun] or list(jobs)
    for job in jobs:
        job.again()
    if len(suspects) == 1 and suspects[0].attempt >= most:
        return suspects
    for job in suspects:
        job.attempt += 1
        job.suspect = True
        job.tell("attempt")
    return []
