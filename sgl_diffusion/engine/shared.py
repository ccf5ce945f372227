"""What the parts of a runner have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sgl_diffusion.engine.accounts import Accounts
from sgl_diffusion.engine.batch_sizes import BatchSizes
from sgl_diffusion.engine.job import Job
from sgl_diffusion.orchestrator.stage import Outbox

Fail = Callable[[list[Job], Exception], None]


@dataclass(frozen=True)
class Shared:
    """`jobs` are those that somebody waits for; `fail` ends some of them."""

    jobs: Mapping[str, Job]
    sizes: BatchSizes
    accounts: Accounts
    outbox: Outbox
    fail: Fail
