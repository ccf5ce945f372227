"""Z-Image transformer: Tongyi-MAI/Z-Image and Z-Image-Turbo.

Shapes: B rows (independent jobs, each at its own timestep), C latent channels, h/w latent rows and
columns, S image tokens (2x2 patches, row by row), L caption tokens, D = H*d hidden width.

Image and caption are refined apart and then go through the layers as [image, caption]. Each is
filled up to a multiple of 32 with a learned token, which takes part in attention. The caption's own
part does not depend on the timestep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.attention import Attend, AttentionContext
from sgl_diffusion.attention.sdpa import SdpaBackend
from sgl_diffusion.layers.embed import (
    Grid,
    Rope,
    join_ropes,
    patchify,
    rope_tables,
    sinusoid,
    token_grid,
    unpatchify,
)
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.mlp import Mlp
from sgl_diffusion.layers.packing import Packing
from sgl_diffusion.layers.runs import Run, attend_runs, pad_rows, runs_of
from sgl_diffusion.models.params import read_params

PATCH = (1, 2, 2)
MULTIPLE = 32
TIME_CHANNELS = 256
QK_EPS = 1e-5


@dataclass(frozen=True)
class ZImageParams:
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    siglip_feat_dim: int | None = None

    @property
    def attention_head_dim(self) -> int:
        return self.dim // self.n_heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ZImageParams:
        """From config.json."""
        return read_params(cls, config, only=_ONLY, what="Z-Image transformer")


# Config values that change the computation, with the one value this file computes.
_ONLY: Mapping[str, Any] = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "qk_norm": True,
}


@dataclass(frozen=True)
class ZImageContext:
    """Refined captions [B, L, D], each row's own tokens first; `lengths` counts those."""

    caption: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def cat(contexts: Sequence[ZImageContext]) -> ZImageContext:
        """Captions of several rows, of any lengths, as one batch."""
        lengths = tuple(length for context in contexts for length in context.lengths)
        return ZImageContext(pad_rows([context.caption for context in contexts]), lengths)


class ZImageLayers(nn.Module):
    """What the transformers with and without reference pictures have in common."""

    def __init__(self, params: ZImageParams) -> None:
        super().__init__()
        self.params = params
        self.attention = AttentionContext.on_one_rank(SdpaBackend())
        dim, patch = params.dim, 4 * params.in_channels
        self.x_embedder = Linear(patch, dim)
        self.x_pad_token = nn.Parameter(torch.empty(1, dim))
        self.cap_norm = nn.RMSNorm(params.cap_feat_dim)
        self.cap_embedder = Linear(params.cap_feat_dim, dim)
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim))
        signal = min(dim, 256)
        self.t_embedder = Mlp(TIME_CHANNELS, 1024, signal, "silu")
        refiners = range(params.n_refiner_layers)
        self.noise_refiner = nn.ModuleList(ZImageBlock(params, signal) for _ in refiners)
        self.context_refiner = nn.ModuleList(ZImageBlock(params, None) for _ in refiners)
        self.layers = nn.ModuleList(ZImageBlock(params, signal) for _ in range(params.n_layers))
        self.final_modulation = Linear(signal, dim)
        self.final_layer = Linear(dim, patch)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order in which they run in every step."""
        return [*self.noise_refiner, *self.layers]

    def signal(self, timestep: Tensor) -> Tensor:
        """[B, 256], what modulates the blocks."""
        time = (1000 - timestep) / 1000 * self.params.t_scale
        return self.t_embedder(sinusoid(time, TIME_CHANNELS).to(self.dtype))

    def embed(self, latents: Tensor) -> Tensor:
        """Tokens [B, S, D] of pictures [B, C, 1, h, w], filled up."""
        x = self.x_embedder(patchify(latents.to(self.dtype), PATCH, channels="last"))
        return fill(x, self.x_pad_token)

    def embed_caption(self, caption: Tensor) -> Tensor:
        """Tokens [1, L, D] of the states of a text, filled up."""
        states = ops.norm_modulate(
            caption.to(self.dtype),
            weight=self.cap_norm.weight,
            eps=self.params.norm_eps,
            kind="rms",
        )
        return fill(self.cap_embedder(states), self.cap_pad_token)

    def finish(self, x: Tensor, signal: Tensor, grid: Grid) -> Tensor:
        """The velocity of the picture whose tokens come first in `x`."""
        scale = self.final_modulation(functional.silu(signal))
        x = ops.norm_modulate(x[:, : math.prod(grid)], scale, eps=1e-6)
        return -unpatchify(self.final_layer(x), grid, PATCH)

    def image_rope(self, grid: Grid, full: int, start: int) -> Rope:
        """Angles of the image's tokens, then those at the origin of the learned token."""
        cos, sin = self.rope(grid, (start, 0, 0))
        rest = (full - cos.shape[0], cos.shape[1])
        return torch.cat((cos, cos.new_ones(rest))), torch.cat((sin, sin.new_zeros(rest)))

    def rope(self, grid: Grid, origin: Grid) -> Rope:
        params, device = self.params, self.x_embedder.weight.device
        return rope_tables(grid, params.axes_dims, device, params.rope_theta, origin)


class ZImageTransformer(ZImageLayers):
    def prepare(self, caption: Tensor) -> ZImageContext:
        """The states [1, L, cap] of one caption to what `forward` reads of it, for all steps."""
        x = self.embed_caption(caption)
        full = x.shape[1]
        whole = runs_of([full])
        for block in self.context_refiner:
            x = block(x, None, (self._caption_rope(full),), whole, self.attention.local)
        return ZImageContext(x, (full,))

    def forward(self, latents: Tensor, timestep: Tensor, context: ZImageContext) -> Tensor:
        """Velocity [B, C, 1, h, w] in the model's dtype, of latents [B, C, 1, h, w].

        `timestep` [B] counts from 0 (clean) to 1000 (noise), one per row.
        """
        grid = token_grid(latents, PATCH)
        signal, x = self.signal(timestep), self.embed(latents)
        full = x.shape[1]

        # The image stands behind the caption, so its angles depend on the caption's length.
        captions = runs_of(context.lengths)
        images = tuple(Run(run.rows, full) for run in captions)
        ropes = tuple(self.image_rope(grid, full, run.length + 1) for run in captions)
        for block in self.noise_refiner:
            x = block(x, signal, ropes, images, self.attention.tokens)

        x = torch.cat((x, context.caption), dim=1)
        runs = tuple(Run(run.rows, full + run.length) for run in captions)
        ropes = tuple(
            join_ropes(rope, self._caption_rope(run.length))
            for rope, run in zip(ropes, captions, strict=True)
        )
        for block in self.layers:
            x = block(x, signal, ropes, runs, self.attention.tokens)

        return self.finish(x, signal, grid)

    def packed(
        self, latents: Sequence[Tensor], timestep: Tensor, context: ZImageContext
    ) -> list[Tensor]:
        """`forward` of rows [1, C, 1, h, w] of different sizes, in one pass."""
        grids, signal = [token_grid(x, PATCH) for x in latents], self.signal(timestep)
        parts = [self.embed(x) for x in latents]
        images = Packing(signal.device, [part.shape[1] for part in parts])
        ropes = [
            self.image_rope(grid, full, length + 1)
            for grid, full, length in zip(grids, images.lengths, context.lengths, strict=True)
        ]
        x = torch.cat(parts, dim=1)
        each, attend = images.spread(signal), images.among(self.attention)
        for block in self.noise_refiner:
            x = block(x, each, (join_ropes(*ropes),), runs_of([x.shape[1]]), attend)

        captions = context.caption.split(1)
        parts, tables = [], []
        rows = zip(images.split(x), captions, ropes, context.lengths, strict=True)
        for image, caption, rope, length in rows:
            parts += [image, caption[:, :length]]
            tables += [rope, self._caption_rope(length)]
        x, rope = torch.cat(parts, dim=1), join_ropes(*tables)
        whole = Packing(
            x.device, [a + b for a, b in zip(images.lengths, context.lengths, strict=True)]
        )
        each, attend = whole.spread(signal), whole.among(self.attention)
        for block in self.layers:
            x = block(x, each, (rope,), runs_of([x.shape[1]]), attend)

        ends = zip(whole.split(x), signal.split(1), grids, strict=True)
        return [self.finish(*end) for end in ends]

    def _caption_rope(self, length: int) -> Rope:
        return self.rope((length, 1, 1), (1, 0, 0))


class ZImageBlock(nn.Module):
    """Attention and perceptron, each with a norm before and one after; `signal` is the width of
    what modulates the block, one vector for each row or each token, or None."""

    def __init__(self, params: ZImageParams, signal: int | None) -> None:
        super().__init__()
        dim, head_dim = params.dim, params.attention_head_dim
        hidden = int(dim / 3 * 8)
        self.heads, self.eps = params.n_heads, params.norm_eps
        self.modulation = None if signal is None else Linear(signal, 4 * dim)
        self.attention_norm1 = nn.RMSNorm(dim)
        self.to_qkv = Linear(dim, {"q": dim, "k": dim, "v": dim}, bias=False)
        self.norm_q = nn.RMSNorm(head_dim)
        self.norm_k = nn.RMSNorm(head_dim)
        self.to_out = Linear(dim, dim, bias=False)
        self.attention_norm2 = nn.RMSNorm(dim)
        self.ffn_norm1 = nn.RMSNorm(dim)
        self.w13 = Linear(dim, {"w1": hidden, "w3": hidden}, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)
        self.ffn_norm2 = nn.RMSNorm(dim)

    def forward(
        self,
        x: Tensor,
        signal: Tensor | None,
        ropes: Sequence[Rope],
        runs: Sequence[Run],
        attend: Attend,
    ) -> Tensor:
        scale, gate, scale_mlp, gate_mlp = self._modulation(signal)
        y = self._norm(self.attention_norm1, x, scale)
        y = self._norm(self.attention_norm2, self._attention(y, ropes, runs, attend))
        x, y = ops.gate_residual_norm_modulate(
            x, y, gate, scale_mlp, weight=self.ffn_norm1.weight, eps=self.eps, kind="rms"
        )
        hidden, factor = self.w13.split(self.w13(y))
        y = self._norm(self.ffn_norm2, self.w2(ops.silu_mul(hidden, factor)))
        return ops.gate_residual(x, y, gate_mlp, out=x)

    def _modulation(self, signal: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.modulation is None or signal is None:
            return None, None, None, None
        scale, gate, scale_mlp, gate_mlp = self.modulation(signal).chunk(4, dim=-1)
        return scale, gate.tanh(), scale_mlp, gate_mlp.tanh()

    def _norm(self, norm: nn.RMSNorm, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return ops.norm_modulate(x, scale, weight=norm.weight, eps=self.eps, kind="rms")

    def _attention(
        self, x: Tensor, ropes: Sequence[Rope], runs: Sequence[Run], attend: Attend
    ) -> Tensor:
        parts = self.to_qkv.split(self.to_qkv(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        weights = (self.norm_q.weight, self.norm_k.weight)
        for run, rope in zip(runs, ropes, strict=True):
            part = (run.rows, slice(run.length))
            ops.qk_norm_rope_(q[part], k[part], *weights, *rope, eps=QK_EPS, norm="head")
        return self.to_out(attend_runs(attend, q, k, v, runs).flatten(2))


def filled(length: int) -> int:
    """The length of a sequence after padding with learned tokens."""
    return -(-length // MULTIPLE) * MULTIPLE


def fill(x: Tensor, token: Tensor) -> Tensor:
    """Tokens [B, S, D], and behind them as many of the learned one [1, D] as it takes."""
    rows, length, _ = x.shape
    return torch.cat((x, token.expand(rows, filled(length) - length, -1)), dim=1)
