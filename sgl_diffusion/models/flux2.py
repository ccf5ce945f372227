"""FLUX.2 image transformer: black-forest-labs/FLUX.2-dev and FLUX.2-klein.

Shapes: B rows (independent jobs, each at its own timestep), C latent channels, h/w latent rows and
columns, S image tokens (one per latent, row by row, then those of reference pictures), L text
tokens, D = H*d hidden width of H heads, M = hidden width of the perceptrons.

As in FLUX.1, double blocks keep text and image apart and single blocks treat [text, image] as one
sequence; but modulation is computed once for all blocks, and no layer has a bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.attention import Attend, AttentionContext
from sgl_diffusion.attention.sdpa import SdpaBackend
from sgl_diffusion.layers.embed import Rope, join_ropes, rope_tables, sinusoid
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.mlp import Mlp
from sgl_diffusion.layers.packing import Packing, per_token
from sgl_diffusion.models.params import read_params

Modulation = tuple[Tensor, ...]  # [B, D] each: shift, scale, gate, and again for the perceptron

# Reference pictures stand apart along the first axis.
FIRST_REFERENCE, NEXT_REFERENCE = 10, 10


@dataclass(frozen=True)
class Flux2Params:
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, int, int, int] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Flux2Params:
        """From config.json."""
        return read_params(cls, config, only={"patch_size": 1}, what="FLUX.2 transformer")


@dataclass(frozen=True)
class Flux2Context:
    """What the blocks read of the conditions of B rows, for all steps.

    text [B, L, D]; guidance [B, D], its part of the modulation, zero where the model takes none;
    references [B, R, D], the tokens of reference pictures, with the sizes of their grids.
    """

    text: Tensor
    guidance: Tensor
    references: Tensor
    grids: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def cat(contexts: Sequence[Flux2Context]) -> Flux2Context:
        """Conditions of several rows as one batch; their lengths agree."""
        return Flux2Context(
            torch.cat([context.text for context in contexts]),
            torch.cat([context.guidance for context in contexts]),
            torch.cat([context.references for context in contexts]),
            contexts[0].grids,
        )


class Flux2Transformer(nn.Module):
    def __init__(self, params: Flux2Params) -> None:
        super().__init__()
        self.params = params
        self.attention = AttentionContext.on_one_rank(SdpaBackend())
        width, channels = params.width, params.timestep_guidance_channels
        self.x_embedder = Linear(params.in_channels, width, bias=False)
        self.context_embedder = Linear(params.joint_attention_dim, width, bias=False)
        self.time_embedder = Mlp(channels, width, width, "silu", bias=False)
        self.guidance_embedder = (
            Mlp(channels, width, width, "silu", bias=False) if params.guidance_embeds else None
        )
        self.image_modulation = Linear(width, 6 * width, bias=False)
        self.text_modulation = Linear(width, 6 * width, bias=False)
        self.single_modulation = Linear(width, 3 * width, bias=False)
        self.double_blocks = nn.ModuleList(DoubleBlock(params) for _ in range(params.num_layers))
        self.single_blocks = nn.ModuleList(
            SingleBlock(params) for _ in range(params.num_single_layers)
        )
        self.norm_out = Linear(width, 2 * width, bias=False)
        self.proj_out = Linear(width, params.out_channels or params.in_channels, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.weight.dtype

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [*self.double_blocks, *self.single_blocks]

    def prepare(
        self, text: Tensor, guidance: float, references: Sequence[Tensor] = ()
    ) -> Flux2Context:
        """Text states [B, L, joint] and latents of reference pictures [B, C, 1, h, w] to what
        `forward` reads of them, once for all steps."""
        rows, text = text.shape[0], self.context_embedder(text.to(self.dtype))
        signal = text.new_zeros(rows, self.params.width)
        if self.guidance_embedder is not None:
            scale = torch.full((rows,), 1000 * guidance, device=text.device)
            signal = self.guidance_embedder(self._wave(scale))
        tokens = [text.new_empty(rows, 0, self.params.width)]
        tokens += [self.x_embedder(_tokens(r.to(self.dtype))) for r in references]
        grids = tuple((r.shape[3], r.shape[4]) for r in references)
        return Flux2Context(text, signal, torch.cat(tokens, dim=1), grids)

    def forward(self, latents: Tensor, timestep: Tensor, context: Flux2Context) -> Tensor:
        """Velocity [B, C, 1, h, w] in the model's dtype, of latents [B, C, 1, h, w].

        `timestep` [B] counts from 0 (clean) to 1000 (noise), one per row.
        """
        image = self.x_embedder(_tokens(latents.to(self.dtype)))
        tokens, (height, width) = image.shape[1], latents.shape[3:]
        image = torch.cat((image, context.references), dim=1)
        text = context.text
        rope = self._rope(text.shape[1], (height, width), context.grids)
        signal = functional.silu(self.time_embedder(self._wave(timestep)) + context.guidance)
        on_text = self.text_modulation(signal).chunk(6, dim=-1)
        on_image = self.image_modulation(signal).chunk(6, dim=-1)
        on_both = self.single_modulation(signal).chunk(3, dim=-1)

        for block in self.double_blocks:
            text, image = block(text, image, on_text, on_image, rope, self.attention.tokens)
        x = torch.cat((text, image), dim=1)
        for block in self.single_blocks:
            x = block(x, on_both, rope, self.attention.tokens)
        start = context.text.shape[1]
        return self._finish(x[:, start : start + tokens], signal, (height, width))

    def packed(
        self, latents: Sequence[Tensor], timestep: Tensor, context: Flux2Context
    ) -> list[Tensor]:
        """`forward` of rows [1, C, 1, h, w] of different sizes in one pass, without references."""
        assert not context.grids, "rows with reference pictures are not packed"
        grids = [(x.shape[3], x.shape[4]) for x in latents]
        image = self.x_embedder(torch.cat([_tokens(x.to(self.dtype)) for x in latents], dim=1))
        rows, length = context.text.shape[:2]
        text = context.text.flatten(0, 1)[None]
        kinds = Packing(image.device, [length] * rows, [h * w for h, w in grids])
        whole = Packing(image.device, kinds.lengths)
        by_row = join_ropes(*(self._rope(length, grid, ()) for grid in grids))
        cos, sin = (table[kinds.places] for table in by_row)
        signal = functional.silu(self.time_embedder(self._wave(timestep)) + context.guidance)
        of_text, of_image = kinds.rows.split([text.shape[1], image.shape[1]])
        on_text = per_token(self.text_modulation(signal), of_text).chunk(6, dim=-1)
        on_image = per_token(self.image_modulation(signal), of_image).chunk(6, dim=-1)
        on_both = whole.spread(self.single_modulation(signal)).chunk(3, dim=-1)

        attend = kinds.among(self.attention)
        for block in self.double_blocks:
            text, image = block(text, image, on_text, on_image, (cos, sin), attend)
        x, attend = torch.cat((text, image), dim=1)[:, kinds.order], whole.among(self.attention)
        for block in self.single_blocks:
            x = block(x, on_both, by_row, attend)

        ends = zip(whole.split(x), signal.split(1), grids, strict=True)
        return [self._finish(row[:, length:], own, grid) for row, own, grid in ends]

    def _finish(self, x: Tensor, signal: Tensor, grid: tuple[int, int]) -> Tensor:
        """The velocity of pictures whose tokens these are."""
        scale, shift = self.norm_out(signal).chunk(2, dim=-1)
        x = self.proj_out(ops.norm_modulate(x, scale, shift, eps=self.params.eps))
        return x.transpose(1, 2).unflatten(-1, (1, *grid))

    def _wave(self, t: Tensor) -> Tensor:
        return sinusoid(t, self.params.timestep_guidance_channels).to(self.dtype)

    def _rope(
        self, text: int, grid: tuple[int, int], references: tuple[tuple[int, int], ...]
    ) -> Rope:
        """Angles of [text, image, references], along time, row, column and place in the text."""
        device, params = self.x_embedder.weight.device, self.params

        def table(grid: tuple[int, ...], first: int = 0) -> Rope:
            origin = (first, 0, 0, 0)
            return rope_tables(grid, params.axes_dims_rope, device, params.rope_theta, origin)

        parts = [table((1, 1, 1, text)), table((1, *grid, 1))]
        for index, size in enumerate(references):
            parts.append(table((1, *size, 1), FIRST_REFERENCE + NEXT_REFERENCE * index))
        return join_ropes(*parts)


class DoubleBlock(nn.Module):
    def __init__(self, params: Flux2Params) -> None:
        super().__init__()
        self.heads = params.num_attention_heads
        self.image = Stream(params)
        self.text = Stream(params)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        on_text: Modulation,
        on_image: Modulation,
        rope: Rope,
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
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


class Stream(nn.Module):
    """The half of a double block that belongs to one kind of token."""

    def __init__(self, params: Flux2Params) -> None:
        super().__init__()
        width, self.eps = params.width, params.eps
        self.to_qkv = Linear(width, {"q": width, "k": width, "v": width}, bias=False)
        self.norm_q = nn.RMSNorm(params.attention_head_dim)
        self.norm_k = nn.RMSNorm(params.attention_head_dim)
        self.to_out = Linear(width, width, bias=False)
        self.linear_in = Linear(width, 2 * params.hidden, bias=False)
        self.linear_out = Linear(params.hidden, width, bias=False)

    def project(self, x: Tensor, modulation: Modulation) -> Tensor:
        shift, scale = modulation[:2]
        return self.to_qkv(ops.norm_modulate(x, scale, shift, eps=self.eps))

    def rotate(self, q: Tensor, k: Tensor, rope: Rope) -> None:
        weights = (self.norm_q.weight, self.norm_k.weight)
        ops.qk_norm_rope_(q, k, *weights, *rope, eps=self.eps, norm="head")

    def update(self, x: Tensor, y: Tensor, modulation: Modulation) -> Tensor:
        """The residual stream after attention's result `y` and the perceptron."""
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        x, y = ops.gate_residual_norm_modulate(
            x, self.to_out(y), gate, scale_mlp, shift_mlp, eps=self.eps
        )
        hidden, factor = self.linear_in(y).chunk(2, dim=-1)
        y = self.linear_out(ops.silu_mul(hidden, factor))
        return ops.gate_residual(x, y, gate_mlp, out=x)


class SingleBlock(nn.Module):
    """Attention and perceptron side by side, in one matrix before and one after."""

    def __init__(self, params: Flux2Params) -> None:
        super().__init__()
        width, hidden, self.eps = params.width, params.hidden, params.eps
        self.heads = params.num_attention_heads
        self.parts = [width, width, width, hidden, hidden]
        self.to_qkv_mlp = Linear(width, sum(self.parts), bias=False)
        self.norm_q = nn.RMSNorm(params.attention_head_dim)
        self.norm_k = nn.RMSNorm(params.attention_head_dim)
        self.to_out = Linear(width + hidden, width, bias=False)

    def forward(self, x: Tensor, modulation: Modulation, rope: Rope, attend: Attend) -> Tensor:
        shift, scale, gate = modulation
        fused = self.to_qkv_mlp(ops.norm_modulate(x, scale, shift, eps=self.eps))
        *qkv, hidden, factor = fused.split(self.parts, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in qkv)
        weights = (self.norm_q.weight, self.norm_k.weight)
        ops.qk_norm_rope_(q, k, *weights, *rope, eps=self.eps, norm="head")
        y = torch.cat((attend(q, k, v).flatten(2), ops.silu_mul(hidden, factor)), dim=-1)
        return ops.gate_residual(x, self.to_out(y), gate, out=x)


def _tokens(latents: Tensor) -> Tensor:
    """[B, C, 1, h, w] -> [B, h*w, C]."""
    return latents.flatten(2).transpose(1, 2)
