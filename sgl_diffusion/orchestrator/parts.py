"""What several stages make of one job, until each of them has done its part."""

from __future__ import annotations

from typing import Any

from sgl_diffusion.orchestrator.messages import Payload


class Parts:
    """Begins with the stage that takes the job; another one is open from the first thing that it
    was sent."""

    def __init__(self, first: str) -> None:
        self.open = [first]
        self.meta: Payload = {}
        self.arrays: list[Any] = []

    def sent(self, stage: str) -> None:
        if stage not in self.open:
            self.open.append(stage)

    def ended(self, stage: str, meta: Payload, arrays: list[Any]) -> bool:
        """This stage has done its part; True when all have, and `meta` and `arrays` are whole."""
        self.gave(meta, arrays)
        self.open.remove(stage)
        return not self.open

    def gave(self, meta: Payload, arrays: list[Any]) -> None:
        """The same of a stage to which more is on its way."""
        self.meta |= meta
        self.arrays += arrays
