"""Qwen-Image transformer: Qwen/Qwen-Image, -Edit and -Edit-2509/2511.

Shapes: B rows (independent jobs, each at its own timestep), C latent channels, h/w latent rows and
columns, S image tokens (2x2 patches, row by row, then those of reference pictures), L text tokens,
D = H*d hidden width of H heads.

Image and text keep weights of their own and attend to each other as [image, text]. Positions of a
picture count from its middle; the text stands on the diagonal behind the largest picture. In some
checkpoints (`zero_cond_t`) reference pictures are modulated as clean ones, at timestep 0.
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
from sgl_diffusion.layers.joint import JointStream, Modulated
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.mlp import Mlp
from sgl_diffusion.layers.packing import Packing
from sgl_diffusion.layers.runs import Run, attend_runs, pad_rows, runs_of
from sgl_diffusion.models.params import read_params

PATCH = (1, 2, 2)
EPS = 1e-6
TIME_CHANNELS = 256


@dataclass(frozen=True)
class QwenImageParams:
    in_channels: int = 64
    out_channels: int | None = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)
    zero_cond_t: bool = False

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QwenImageParams:
        """From config.json."""
        return read_params(cls, config, only=_ONLY, what="Qwen-Image transformer")


# Config values that change the computation, with the one value this file computes.
_ONLY: Mapping[str, Any] = {
    "patch_size": 2,
    "guidance_embeds": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}


@dataclass(frozen=True)
class QwenImageContext:
    """What the blocks read of the conditions of B rows, for all steps.

    text [B, L, D], each row's own tokens first, and how many those are; references [B, R, D], the
    tokens of reference pictures, with the sizes of their token grids.
    """

    text: Tensor
    lengths: tuple[int, ...]
    references: Tensor
    grids: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def cat(contexts: Sequence[QwenImageContext]) -> QwenImageContext:
        """Conditions of several rows, with texts of any length, as one batch."""
        return QwenImageContext(
            pad_rows([context.text for context in contexts]),
            tuple(length for context in contexts for length in context.lengths),
            torch.cat([context.references for context in contexts]),
            contexts[0].grids,
        )


class QwenImageTransformer(nn.Module):
    def __init__(self, params: QwenImageParams) -> None:
        super().__init__()
        self.params = params
        self.attention = AttentionContext.on_one_rank(SdpaBackend())
        width = params.width
        self.img_in = Linear(params.in_channels, width)
        self.txt_norm = nn.RMSNorm(params.joint_attention_dim)
        self.txt_in = Linear(params.joint_attention_dim, width)
        self.time_embedder = Mlp(TIME_CHANNELS, width, width, "silu")
        self.blocks = nn.ModuleList(QwenImageBlock(params) for _ in range(params.num_layers))
        self.norm_out = Linear(width, 2 * width)
        self.proj_out = Linear(width, 4 * (params.out_channels or params.in_channels))

    @property
    def dtype(self) -> torch.dtype:
        return self.img_in.weight.dtype

    def prepare(self, text: Tensor, references: Sequence[Tensor] = ()) -> QwenImageContext:
        """The states [1, L, joint] of one prompt and latents [1, C, 1, h, w] of its reference
        pictures to what `forward` reads of them, for all steps."""
        text = ops.norm_modulate(
            text.to(self.dtype), weight=self.txt_norm.weight, eps=EPS, kind="rms"
        )
        text = self.txt_in(text)
        grids = tuple(token_grid(latents, PATCH)[1:] for latents in references)
        tokens = [text.new_empty(1, 0, text.shape[-1])]
        tokens += [self.img_in(patchify(r.to(self.dtype), PATCH)) for r in references]
        return QwenImageContext(text, (text.shape[1],), torch.cat(tokens, dim=1), grids)

    def forward(self, latents: Tensor, timestep: Tensor, context: QwenImageContext) -> Tensor:
        """Velocity [B, C, 1, h, w] in the model's dtype, of latents [B, C, 1, h, w].

        `timestep` [B] counts from 0 (clean) to 1000 (noise), one per row.
        """
        grid = token_grid(latents, PATCH)
        image = self.img_in(patchify(latents.to(self.dtype), PATCH))
        tokens = image.shape[1]
        image = torch.cat((image, context.references), dim=1)
        text = context.text
        rope = self._rope((grid[1:], *context.grids), text.shape[1])
        runs = runs_of([image.shape[1] + length for length in context.lengths])

        signal = self._signal(timestep)
        parts = [(slice(None), signal)]
        if self.params.zero_cond_t and context.grids:
            clean = self._signal(torch.zeros_like(timestep))
            parts = [(slice(tokens), signal), (slice(tokens, None), clean)]
        for block in self.blocks:
            image, text = block(image, text, parts, rope, runs, self.attention.tokens)

        return self._finish(image[:, :tokens], signal, grid)

    def packed(
        self, latents: Sequence[Tensor], timestep: Tensor, context: QwenImageContext
    ) -> list[Tensor]:
        """`forward` of rows [1, C, 1, h, w] of different sizes, in one pass, without references."""
        assert not context.grids, "rows with reference pictures are not packed"
        grids = [token_grid(x, PATCH) for x in latents]
        image = torch.cat([patchify(x.to(self.dtype), PATCH) for x in latents], dim=1)
        image = self.img_in(image)
        texts = zip(context.text.split(1), context.lengths, strict=True)
        text = torch.cat([x[:, :length] for x, length in texts], dim=1)
        kinds = Packing(image.device, [math.prod(grid) for grid in grids], context.lengths)
        ropes = [
            self._rope((grid[1:],), length)
            for grid, length in zip(grids, context.lengths, strict=True)
        ]
        places = kinds.places
        cos, sin = (x[places] for x in join_ropes(*ropes))
        signal = self._signal(timestep)

        own = kinds.rows.split([image.shape[1], text.shape[1]])
        parts, runs = [(slice(None), signal)], runs_of([len(places)])
        attend = kinds.among(self.attention)
        for block in self.blocks:
            image, text = block(image, text, parts, (cos, sin), runs, attend, own)

        pictures = image.split(list(kinds.kinds[0]), dim=1)
        ends = zip(pictures, signal.split(1), grids, strict=True)
        return [self._finish(*end) for end in ends]

    def _finish(self, x: Tensor, signal: Tensor, grid: Grid) -> Tensor:
        """The velocity of pictures whose tokens these are."""
        scale, shift = self.norm_out(signal).chunk(2, dim=-1)
        x = ops.norm_modulate(x, scale, shift, eps=EPS)
        return unpatchify(self.proj_out(x), grid, PATCH, channels="first")

    def _signal(self, timestep: Tensor) -> Tensor:
        wave = sinusoid(timestep, TIME_CHANNELS).to(self.dtype)
        return functional.silu(self.time_embedder(wave))

    def _rope(self, grids: Sequence[tuple[int, int]], text: int) -> Rope:
        """Angles of every picture's tokens, then of the text's."""
        device, widths = self.img_in.weight.device, self.params.axes_dims_rope
        parts = [
            rope_tables((1, h, w), widths, device, origin=(index, h // 2 - h, w // 2 - w))
            for index, (h, w) in enumerate(grids)
        ]
        start = max(max(h // 2, w // 2) for h, w in grids)
        axes = [rope_tables((text,), (width,), device, origin=(start,)) for width in widths]
        cos, sin = (torch.cat(tables, dim=-1) for tables in zip(*axes, strict=True))
        return join_ropes(*parts, (cos, sin))


class QwenImageBlock(nn.Module):
    def __init__(self, params: QwenImageParams) -> None:
        super().__init__()
        self.heads = params.num_attention_heads
        self.image = JointStream(params.width, params.attention_head_dim, EPS)
        self.text = JointStream(params.width, params.attention_head_dim, EPS)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        signals: Sequence[tuple[slice, Tensor]],
        rope: Rope,
        runs: Sequence[Run],
        attend: Attend,
        rows: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """`rows` says whose row each token of image and text is, where rows are packed."""
        on_image: list[Modulated] = [
            self.image.modulate(signal, tokens, rows[0]) for tokens, signal in signals
        ]
        on_text = [self.text.modulate(signals[0][1], rows=rows[1])]
        joint = torch.cat(
            (self.image.project(image, on_image), self.text.project(text, on_text)), dim=1
        )
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.text.to_qkv.split(joint))
        length = image.shape[1]
        for stream, part in ((self.image, slice(length)), (self.text, slice(length, None))):
            stream.rotate(q[:, part], k[:, part], (rope[0][part], rope[1][part]))
        y = attend_runs(attend, q, k, v, runs).flatten(2)
        return (
            self.image.update(image, y[:, :length], on_image),
            self.text.update(text, y[:, length:], on_text),
        )
