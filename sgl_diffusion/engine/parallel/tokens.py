"""One sequence over many ranks: a transformer's tokens are shared out before its first block and
joined after its last one.

Everything happens in hooks around the blocks; the model knows nothing of it. A sequence too short
for every rank to get a token of each segment is not shared out: each rank computes all of it.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from sgl_diffusion.attention import AttentionContext
from sgl_diffusion.attention.base import AttentionBackend
from sgl_diffusion.attention.strategies.spread import SpreadAttention, strategy_of
from sgl_diffusion.distributed.mesh import Mesh
from sgl_diffusion.distributed.shares import Shares
from sgl_diffusion.engine.parallel.families import FAMILIES, Section


def spread_tokens(model: nn.Module, mesh: Mesh, backend: AttentionBackend) -> None:
    """Make the ranks of `mesh.tokens` compute one forward pass of `model` together."""
    if mesh.tokens.size > 1:
        _Spread(model, mesh, backend)


class _Spread:
    """The hooks of one model; `_shares` is how the pass under way is shared out, if it is."""

    def __init__(self, model: nn.Module, mesh: Mesh, backend: AttentionBackend) -> None:
        self._family = FAMILIES[type(model)]
        self._group = mesh.tokens
        self._shares: Shares | None = None
        self._attention = SpreadAttention(strategy_of(mesh, backend), backend)
        before = cast("AttentionContext", model.attention)
        model.attention = AttentionContext(  # type: ignore[assignment]
            tokens=self._attention, local=backend.forward, repeated=before.repeated
        )
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)
        for section in self._family.sections(model):
            for index, block in enumerate(section.blocks):
                block.register_forward_pre_hook(self._before(section, first=index == 0))
            if section.blocks:
                section.blocks[-1].register_forward_hook(self._after(section))

    def _begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        latents, _, context = args
        shares = Shares(self._family.segments(model, latents, context), self._group)
        self._shares = shares if shares.possible else None
        self._attention.reset()

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._shares = None
        self._attention.reset()

    def _before(self, section: Section, first: bool) -> Any:
        def cut(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            shares = self._shares
            if shares is None:
                return None
            if first:
                args = section.part.enter(args, shares)
            args, calls = section.part.each(block, args, shares)
            self._attention.expect(calls)
            return args

        return cut

    def _after(self, section: Section) -> Any:
        def join(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return output if self._shares is None else section.part.leave(output, self._shares)

        return join
