"""FLUX.1 image transformer: black-forest-labs/FLUX.1-dev, -schnell and -Kontext-dev.

Shapes: B rows (independent jobs, each at its own timestep), C latent channels, h/w latent rows and
columns, S image tokens (2x2 patches, row by row, then those of reference pictures), L text tokens,
D = H*d hidden width of H heads.

Double blocks keep text and image apart and let them attend to each other; single blocks treat
[text, image] as one sequence. Modulation depends on the timestep, the guidance scale and the
pooled prompt only; the last two do not change between steps.
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
from sgl_diffusion.layers.joint import JointStream
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.mlp import Mlp
from sgl_diffusion.layers.packing import Packing, per_token
from sgl_diffusion.models.params import read_params

PATCH = (1, 2, 2)
EPS = 1e-6
TIME_CHANNELS = 256


@dataclass(frozen=True)
class FluxParams:
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        return self.in_channels // 4

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FluxParams:
        """From config.json."""
        return read_params(cls, config, only={"patch_size": 1}, what="FLUX transformer")


@dataclass(frozen=True)
class FluxContext:
    """What the blocks read of the conditions of B rows, for all steps.

    text [B, L, D]; vector [B, D], the part of the modulation that does not depend on the step;
    references [B, R, D], the tokens of reference pictures, with the sizes of their token grids.
    """

    text: Tensor
    vector: Tensor
    references: Tensor
    grids: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def cat(contexts: Sequence[FluxContext]) -> FluxContext:
        """Conditions of several rows as one batch; their lengths agree."""
        return FluxContext(
            torch.cat([context.text for context in contexts]),
            torch.cat([context.vector for context in contexts]),
            torch.cat([context.references for context in contexts]),
            contexts[0].grids,
        )


class FluxTransformer(nn.Module):
    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        self.attention = AttentionContext.on_one_rank(SdpaBackend())
        width = params.width
        self.x_embedder = Linear(params.in_channels, width)
        self.context_embedder = Linear(params.joint_attention_dim, width)
        self.time_embedder = Mlp(TIME_CHANNELS, width, width, "silu")
        self.guidance_embedder = (
            Mlp(TIME_CHANNELS, width, width, "silu") if params.guidance_embeds else None
        )
        self.text_embedder = Mlp(params.pooled_projection_dim, width, width, "silu")
        self.double_blocks = nn.ModuleList(DoubleBlock(params) for _ in range(params.num_layers))
        self.single_blocks = nn.ModuleList(
            SingleBlock(params) for _ in range(params.num_single_layers)
        )
        self.norm_out = Linear(width, 2 * width)
        self.proj_out = Linear(width, params.out_channels or params.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]

    def prepare(
        self, text: Tensor, pooled: Tensor, guidance: float, references: Sequence[Tensor] = ()
    ) -> FluxContext:
        """Text [B, L, joint], its pooled vector [B, P] and latents of reference pictures
        [B, C, 1, h, w] to what `forward` reads of them, once for all steps."""
        vector = self.text_embedder(pooled.to(self.dtype))
        if self.guidance_embedder is not None:
            scale = torch.full((len(pooled),), 1000 * guidance, device=pooled.device)
            wave = sinusoid(scale, TIME_CHANNELS).to(self.dtype)
            vector = vector + self.guidance_embedder(wave)
        grids = tuple(token_grid(latents, PATCH)[1:] for latents in references)
        tokens = [self.x_embedder(patchify(r.to(self.dtype), PATCH)) for r in references]
        return FluxContext(
            self.context_embedder(text.to(self.dtype)),
            vector,
            torch.cat(tokens, dim=1)
            if tokens
            else vector.new_empty(len(vector), 0, vector.shape[1]),
            grids,
        )

    def forward(self, latents: Tensor, timestep: Tensor, context: FluxContext) -> Tensor:
        """Velocity [B, C, 1, h, w] in the model's dtype, of latents [B, C, 1, h, w].

        `timestep` [B] counts from 0 (clean) to 1000 (noise), one per row.
        """
        grid = token_grid(latents, PATCH)
        image = self.x_embedder(patchify(latents.to(self.dtype), PATCH))
        tokens = image.shape[1]
        image = torch.cat((image, context.references), dim=1)
        text = context.text
        rope = self._rope(text.shape[1], grid[1:], context.grids)
        signal = self._signal(timestep, context)

        for block in self.double_blocks:
            text, image = block(text, image, signal, rope, self.attention.tokens)
        x = torch.cat((text, image), dim=1)
        for block in self.single_blocks:
            x = block(x, signal, rope, self.attention.tokens)
        start = context.text.shape[1]
        return self._finish(x[:, start : start + tokens], signal, grid)

    def packed(
        self, latents: Sequence[Tensor], timestep: Tensor, context: FluxContext
    ) -> list[Tensor]:
        """`forward` of rows [1, C, 1, h, w] of different sizes, in one pass, without references."""
        assert not context.grids, "rows with reference pictures are not packed"
        grids = [token_grid(x, PATCH) for x in latents]
        image = torch.cat([patchify(x.to(self.dtype), PATCH) for x in latents], dim=1)
        image = self.x_embedder(image)
        rows, length = context.text.shape[:2]
        text = context.text.flatten(0, 1)[None]
        kinds = Packing(image.device, [length] * rows, [math.prod(grid) for grid in grids])
        by_row = join_ropes(*(self._rope(length, grid[1:], ()) for grid in grids))
        cos, sin = (table[kinds.places] for table in by_row)
        signal = self._signal(timestep, context)

        own = kinds.rows.split([text.shape[1], image.shape[1]])
        attend = kinds.among(self.attention)
        for block in self.double_blocks:
            text, image = block(text, image, signal, (cos, sin), attend, own)
        whole = Packing(image.device, kinds.lengths)
        x, attend = torch.cat((text, image), dim=1)[:, kinds.order], whole.among(self.attention)
        for block in self.single_blocks:
            x = block(x, signal, by_row, attend, whole.rows)

        ends = zip(whole.split(x), signal.split(1), grids, strict=True)
        return [self._finish(row[:, length:], own, grid) for row, own, grid in ends]

    def _signal(self, timestep: Tensor, context: FluxContext) -> Tensor:
        """[B, D], what modulates the blocks."""
        wave = sinusoid(timestep, TIME_CHANNELS).to(self.dtype)
        return functional.silu(self.time_embedder(wave) + context.vector)

    def _finish(self, x: Tensor, signal: Tensor, grid: Grid) -> Tensor:
        """The velocity of pictures whose tokens these are."""
        scale, shift = self.norm_out(signal).chunk(2, dim=-1)
        x = ops.norm_modulate(x, scale, shift, eps=EPS)
        return unpatchify(self.proj_out(x), grid, PATCH, channels="first")

    def _rope(
        self, text: int, grid: tuple[int, int], references: tuple[tuple[int, int], ...]
    ) -> Rope:
        """Angles of [text, image, references]: text stands at the origin, references one apart."""
        device, widths = self.x_embedder.weight.device, self.params.axes_dims_rope
        cos = torch.ones(text, sum(widths) // 2, device=device)
        parts = [(cos, torch.zeros_like(cos)), rope_tables((1, *grid), widths, device)]
        parts += [rope_tables((1, *g), widths, device, origin=(1, 0, 0)) for g in references]
        return join_ropes(*parts)


class DoubleBlock(nn.Module):
    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.heads = params.num_attention_heads
        self.image = JointStream(params.width, params.attention_head_dim, EPS)
        self.text = JointStream(params.width, params.attention_head_dim, EPS)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        signal: Tensor,
        rope: Rope,
        attend: Attend,
        rows: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """`rows` says whose row each token of text and image is, where rows are packed."""
        on_text = [self.text.modulate(signal, rows=rows[0])]
        on_image = [self.image.modulate(signal, rows=rows[1])]
        joint = torch.cat(
            (self.text.project(text, on_text), self.image.project(image, on_image)), dim=1
        )
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.text.to_qkv.split(joint))
        length = text.shape[1]
        for stream, part in ((self.text, slice(length)), (self.image, slice(length, None))):
            stream.rotate(q[:, part], k[:, part], (rope[0][part], rope[1][part]))
        y = attend(q, k, v).flatten(2)
        return (
            self.text.update(text, y[:, :length], on_text),
            self.image.update(image, y[:, length:], on_image),
        )


class SingleBlock(nn.Module):
    """Attention and perceptron side by side, in one matrix before and one after."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        width = params.width
        self.heads = params.num_attention_heads
        self.modulation = Linear(width, 3 * width)
        self.to_qkv_mlp = Linear(width, {"q": width, "k": width, "v": width, "mlp": 4 * width})
        self.norm_q = nn.RMSNorm(params.attention_head_dim)
        self.norm_k = nn.RMSNorm(params.attention_head_dim)
        self.to_out = Linear(5 * width, width)

    def forward(
        self, x: Tensor, signal: Tensor, rope: Rope, attend: Attend, rows: Tensor | None = None
    ) -> Tensor:
        shift, scale, gate = per_token(self.modulation(signal), rows).chunk(3, dim=-1)
        fused = self.to_qkv_mlp(ops.norm_modulate(x, scale, shift, eps=EPS))
        *qkv, hidden = self.to_qkv_mlp.split(fused)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)
        ops.qk_norm_rope_(q, k, self.norm_q.weight, self.norm_k.weight, *rope, eps=EPS, norm="head")
        # The attention's result takes the place of the values, beside the perceptron's.
        v.copy_(attend(q, k, v))
        ops.gelu_tanh(hidden, out=hidden)
        y = self.to_out(fused[..., 2 * x.shape[-1] :])
        return ops.gate_residual(x, y, gate, out=x)
