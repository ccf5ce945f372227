"""Z-Image Omni: the Z-Image transformer with reference pictures, Tongyi-MAI/Z-Image-Omni.

Shapes: as in models/z_image.py; R tokens of reference pictures, V tokens of what a vision model
sees in them.

A prompt with pictures is a text in pieces, one before each picture, one before the new picture and
one behind it. References go through the refiners of the image beside the noisy tokens. Everything
that belongs to a reference, and the text up to the last one, is modulated as clean.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgl_diffusion import ops
from sgl_diffusion.layers.embed import Rope, join_ropes, rope_at, token_grid
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.runs import Run, pad_rows, runs_of
from sgl_diffusion.models.z_image import (
    MULTIPLE,
    PATCH,
    ZImageBlock,
    ZImageLayers,
    ZImageParams,
    fill,
    filled,
)


@dataclass(frozen=True)
class OmniContext:
    """What the blocks read of the conditions of B rows, for all steps.

    references [B, R, D]; rest [B, L, D], what is seen and the text, refined, each row's own tokens
    first; `lengths` counts those, `clean` how many of the first are modulated as clean. The new
    picture stands at `places` along the first axis, and `ropes` are the angles of each row's
    references and of its rest. `grids` tell pictures of other sizes apart.
    """

    references: Tensor
    rest: Tensor
    lengths: tuple[int, ...]
    clean: int
    places: tuple[int, ...]
    ropes: tuple[tuple[Rope, Rope], ...]
    grids: tuple[tuple[int, ...], ...] = ()

    @staticmethod
    def cat(contexts: Sequence[OmniContext]) -> OmniContext:
        """Conditions of several rows with texts of any length, and pictures of the same sizes."""
        return OmniContext(
            torch.cat([context.references for context in contexts]),
            pad_rows([context.rest for context in contexts]),
            tuple(length for context in contexts for length in context.lengths),
            contexts[0].clean,
            tuple(place for context in contexts for place in context.places),
            tuple(rope for context in contexts for rope in context.ropes),
            contexts[0].grids,
        )


class ZImageOmniTransformer(ZImageLayers):
    def __init__(self, params: ZImageParams) -> None:
        super().__init__(params)
        assert params.siglip_feat_dim is not None, "this is a plain Z-Image"
        self.siglip_norm = nn.RMSNorm(params.siglip_feat_dim)
        self.siglip_embedder = Linear(params.siglip_feat_dim, params.dim)
        self.siglip_pad_token = nn.Parameter(torch.empty(1, params.dim))
        self.siglip_refiner = nn.ModuleList(
            ZImageBlock(params, None) for _ in range(params.n_refiner_layers)
        )

    def prepare(
        self,
        pieces: Sequence[Tensor],
        references: Sequence[Tensor] = (),
        seen: Sequence[Tensor] = (),
    ) -> OmniContext:
        """The states [1, L, cap] of the pieces of one text, the latents [1, C, 1, h, w] of
        reference pictures and what a vision model sees in each, [y, x, V]."""
        lengths = [piece.shape[1] for piece in pieces]
        # Between two pieces are the places of a picture and of what is seen in it.
        ends = itertools.accumulate(lengths)
        places = [1 + end + 2 * index for index, end in enumerate(ends)]
        rope = self._rope_at(_places_of_text(lengths, places))
        text = torch.cat([self.embed_caption(piece) for piece in pieces], dim=1)
        text = self._refined(self.context_refiner, text, rope)
        if not references:
            nothing = (rope[0][:0], rope[1][:0])
            return OmniContext(
                text[:, :0], text, (text.shape[1],), 0, (places[0],), ((nothing, rope),)
            )
        grids = [token_grid(latents, PATCH) for latents in references]
        tokens = [self.embed(latents) for latents in references]
        angles = [
            self.image_rope(grid, part.shape[1], place)
            for grid, part, place in zip(grids, tokens, places, strict=False)
        ]
        sights, sights_rope = self._sights(references, seen, places)
        # First what is clean, the pieces up to the last reference among it.
        sighted = sights.shape[1] - MULTIPLE
        clean = sum(filled(length) for length in lengths[: len(references)])
        rest = _interleaved(sights[0], sighted, text[0], clean)[None]
        cos, sin = (
            _interleaved(sight, sighted, word, clean)
            for sight, word in zip(sights_rope, rope, strict=True)
        )
        return OmniContext(
            torch.cat(tokens, dim=1),
            rest,
            (rest.shape[1],),
            sighted + clean,
            (places[len(references)],),
            ((join_ropes(*angles), (cos, sin)),),
            tuple((*grid, *view.shape[:2]) for grid, view in zip(grids, seen, strict=True)),
        )

    def forward(self, latents: Tensor, timestep: Tensor, context: OmniContext) -> Tensor:
        """Velocity [B, C, 1, h, w] in the model's dtype, of latents [B, C, 1, h, w].

        `timestep` [B] counts from 0 (clean) to 1000 (noise), one per row.
        """
        grid = token_grid(latents, PATCH)
        noisy = self.signal(timestep)
        x = self.embed(latents)
        full = x.shape[1]
        x = torch.cat((x, context.references), dim=1)
        images = x.shape[1]

        rows = runs_of(context.lengths, context.places)
        pairs = [context.ropes[run.rows.start] for run in rows]
        starts = [context.places[run.rows.start] for run in rows]
        ropes = tuple(
            join_ropes(self.image_rope(grid, full, start), pair[0])
            for start, pair in zip(starts, pairs, strict=True)
        )
        runs = tuple(Run(run.rows, images) for run in rows)
        signal = self._signals(noisy, full, images - full, 0)
        for block in self.noise_refiner:
            x = block(x, signal, ropes, runs, self.attention.tokens)

        x = torch.cat((x, context.rest), dim=1)
        runs = tuple(Run(run.rows, images + run.length) for run in rows)
        ropes = tuple(join_ropes(rope, pair[1]) for rope, pair in zip(ropes, pairs, strict=True))
        clean = images - full + context.clean
        signal = self._signals(noisy, full, clean, x.shape[1] - full - clean)
        for block in self.layers:
            x = block(x, signal, ropes, runs, self.attention.tokens)
        return self.finish(x, noisy, grid)

    def _signals(self, noisy: Tensor, first: int, clean: int, last: int) -> Tensor:
        """[B, 256] if nothing is clean; else [B, S, 256], one for each token."""
        if not clean:
            return noisy
        still = self.signal(torch.zeros(len(noisy), device=noisy.device))
        parts = ((noisy, first), (still, clean), (noisy, last))
        return torch.cat([s[:, None].expand(-1, count, -1) for s, count in parts], dim=1)

    def _sights(
        self, references: Sequence[Tensor], seen: Sequence[Tensor], starts: Sequence[int]
    ) -> tuple[Tensor, Rope]:
        """What is seen [1, V, D] in the references and, as learned tokens, in the new picture."""
        tokens, positions = [], []
        for latents, view, start in zip(references, seen, starts, strict=False):
            height, width, channels = view.shape
            # As diffusers has it: all places of one channel, then of the next, cut into rows anew.
            rows = view.permute(2, 0, 1).reshape(1, height * width, channels)
            tokens.append(self._embed_sight(rows))
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            places = torch.stack(
                (
                    torch.full((height * width,), start + 1),
                    _stretched(y, height, latents.shape[3]),
                    _stretched(x, width, latents.shape[4]),
                ),
                dim=1,
            )
            positions.append(_filled_places(places))
        dim = self.params.dim
        tokens.append(self.siglip_pad_token.expand(1, MULTIPLE, dim))
        positions.append(torch.zeros(MULTIPLE, 3, dtype=torch.long))
        rope = self._rope_at(torch.cat(positions))
        return self._refined(self.siglip_refiner, torch.cat(tokens, dim=1), rope), rope

    def _embed_sight(self, rows: Tensor) -> Tensor:
        states = ops.norm_modulate(
            rows.to(self.dtype),
            weight=self.siglip_norm.weight,
            eps=self.params.norm_eps,
            kind="rms",
        )
        return fill(self.siglip_embedder(states), self.siglip_pad_token)

    def _refined(self, blocks: nn.ModuleList, x: Tensor, rope: Rope) -> Tensor:
        whole = runs_of([x.shape[1]])
        for block in blocks:
            x = block(x, None, (rope,), whole, self.attention.local)
        return x

    def _rope_at(self, positions: Tensor) -> Rope:
        params, device = self.params, self.x_embedder.weight.device
        return rope_at(positions, params.axes_dims, device, params.rope_theta)


def _places_of_text(lengths: Sequence[int], ends: Sequence[int]) -> Tensor:
    """[L, 3] for pieces that end before `ends`.

    As diffusers has it: a piece takes its places, filled up, and as many at the origin as it was
    filled by, so the places of later pieces lag behind their tokens.
    """
    parts = []
    for length, end in zip(lengths, ends, strict=True):
        start, full = end - length, filled(length)
        parts += [torch.arange(start, start + full), torch.zeros(full - length, dtype=torch.long)]
    along = torch.cat(parts)[: sum(filled(length) for length in lengths)]
    return torch.stack((along, torch.zeros_like(along), torch.zeros_like(along)), dim=1)


def _interleaved(first: Tensor, one: int, second: Tensor, two: int) -> Tensor:
    """The beginnings of both, `one` and `two` long, then what is left of both."""
    return torch.cat((first[:one], second[:two], first[one:], second[two:]))


def _stretched(index: Tensor, count: int, edge: int) -> Tensor:
    """Places 0 to count-1 along an edge of latents, as whole numbers."""
    return (index.flatten().float() / max(count - 1, 1) * (edge - 1)).long()


def _filled_places(places: Tensor) -> Tensor:
    """Learned tokens stand at the origin."""
    count = len(places)
    return torch.cat((places, places.new_zeros(filled(count) - count, 3)))
