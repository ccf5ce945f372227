"""Ring attention (arXiv 2310.01889): keys and values go round, each rank attends to what it holds.

The results over parts of the keys are merged by their log-sum-exps in fp32. The next part is under
way while this one is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.attention.base import LseBackend
from sgl_diffusion.attention.strategies.base import Lengths
from sgl_diffusion.distributed.group import Group


class Ring:
    def __init__(self, group: Group, backend: LseBackend) -> None:
        self._group = group
        self._backend = backend

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, scale: float | None
    ) -> Tensor:
        ranks, index = self._group.size, self._group.index
        batch, _, heads, dim = k.shape
        held = torch.stack((k, v)).flatten()
        out: Tensor | None = None
        sums: Tensor | None = None
        for turn in range(ranks):
            shape = (2, batch, lengths.keys[(index - turn) % ranks], heads, dim)
            following = lengths.keys[(index - turn - 1) % ranks]
            if turn < ranks - 1:
                coming, wait = self._group.pass_on(held, 2 * batch * following * heads * dim)
            part, part_sums = self._backend.forward_lse(q, *held.view(shape), scale=scale)
            if out is None or sums is None:
                out, sums = part.float(), part_sums
            else:
                out, sums = ops.attention_merge(out, sums, part.float(), part_sums)
            if turn < ranks - 1:
                wait()
                held = coming
        assert out is not None
        return out.to(q.dtype)
