"""Which stages an app has: names, entry points and configuration, checked when they are made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Self

from sgl_diffusion.orchestrator.messages import Payload

_ENTRY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage: `entry` is "module:function", a `stage.WorkerFactory` that gets `config`.

    Of several replicas each gets its number as `replica` in its configuration.
    """

    name: str
    entry: str
    config: Payload = field(default_factory=dict)
    replicas: int = 1

    def __post_init__(self) -> None:
        assert self.name, "a stage has a name"
        assert _ENTRY.fullmatch(self.entry), f"{self.entry!r} is not module:function"
        assert self.replicas > 0, f"stage {self.name} has no replica"

    def replicated(self) -> list[Self]:
        """The specification of each replica."""
        if self.replicas == 1:
            return [self]
        return [
            replace(
                self,
                name=f"{self.name}-{index}",
                config={**self.config, "replica": index},
                replicas=1,
            )
            for index in range(self.replicas)
        ]


@dataclass(frozen=True, kw_only=True)
class App:
    """A served model as the orchestrator sees it: its stages, the one that takes jobs first. One
    stage is for a `Coordinator`, several are for a `Graph`."""

    name: str
    stages: tuple[StageSpec, ...]
    processes: bool = False  # a stage of it cannot be a thread: it is several processes

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        assert names, f"app {self.name} has no stage"
        assert len(set(names)) == len(names), f"app {self.name} names a stage twice: {names}"
