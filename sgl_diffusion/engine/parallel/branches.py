"""The two branches of guidance on two sets of ranks: each computes one, both get both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.distributed.group import Group
from sgl_diffusion.engine.graphs.capture import Pass
from sgl_diffusion.engine.pipeline import Condition, Context

_ALONE = Group((0,), 0)


class Branches:
    """What this rank computes of a guided batch. Where one rank has both branches, everything."""

    def __init__(self, group: Group = _ALONE) -> None:
        self._group = group

    def conditions(self, with_prompt: list[Condition], without: list[Condition]) -> list[Condition]:
        """Those that this rank needs, out of one of each row."""
        if self._group.size == 1:
            return [*with_prompt, *without]
        return (with_prompt, without)[self._group.index]

    def velocity(
        self, run: Pass, x: Tensor, timesteps: Tensor, context: Context, expert: int
    ) -> Tensor:
        """Latents [B, ...] of the rows to velocities [2B, ...] with and without the prompt, by
        passes of `run`; `context` holds the rows' `conditions`."""
        if self._group.size == 1:
            return run(torch.cat([x, x]), timesteps.repeat(2), context, expert)
        own: Any = run(x, timesteps, context, expert)
        rows = own.flatten(1).unsqueeze(0)
        both = self._group.gather(rows, (len(own),) * self._group.size)
        return torch.cat(both, 1)[0].unflatten(1, own.shape[1:])
