"""Stable Diffusion 3 and 3.5 image transformer: stabilityai/stable-diffusion-3*-diffusers.

Shapes: B rows (independent jobs, each at its own timestep), C latent channels, h/w latent rows and
columns, S image tokens (2x2 patches, row by row), L text tokens, D = H*d hidden width of H heads.

Image and text keep weights of their own and attend to each other as [image, text]; there is no
rotation, a table of positions is added to the image. Some blocks of 3.5 let the image attend to
itself once more. The last block leaves the text as it is.
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
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.layers.embed import Grid, patchify, sinusoid, token_grid, unpatchify
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.mlp import Mlp
from sgl_diffusion.layers.packing import Packing, per_token
from sgl_diffusion.models.params import read_params

EPS = 1e-6
TIME_CHANNELS = 256


@dataclass(frozen=True)
class Sd3Params:
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Grid:
        return 1, self.patch_size, self.patch_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Sd3Params:
        """From config.json."""
        params = read_params(
            cls, config, what="SD3 transformer", indices=("dual_attention_layers",)
        )
        if (
            params.qk_norm not in (None, "rms_norm")
            or params.caption_projection_dim != params.width
        ):
            raise ConfigError(
                f"An SD3 transformer with qk_norm={params.qk_norm!r} and text of "
                f"{params.caption_projection_dim} channels beside {params.width} is not supported.",
                hint="Serve the model with --backend diffusers.",
                param="qk_norm",
            )
        return params


@dataclass(frozen=True)
class Sd3Context:
    """What the blocks read of the conditions of B rows, for all steps: text [B, L, D] and vector
    [B, D], the part of the modulation that does not depend on the step."""

    text: Tensor
    vector: Tensor

    @staticmethod
    def cat(contexts: Sequence[Sd3Context]) -> Sd3Context:
        """Conditions of several rows as one batch; their lengths agree."""
        return Sd3Context(
            torch.cat([context.text for context in contexts]),
            torch.cat([context.vector for context in contexts]),
        )


class Sd3Transformer(nn.Module):
    KEEP_FP32 = ("position",)

    def __init__(self, params: Sd3Params) -> None:
        super().__init__()
        self.params = params
        self.attention = AttentionContext.on_one_rank(SdpaBackend())
        width, area = params.width, params.patch_size**2
        self.patch_embedding = Linear(params.in_channels * area, width)
        self.position = PositionTable(params)
        self.time_embedder = Mlp(TIME_CHANNELS, width, width, "silu")
        self.text_embedder = Mlp(params.pooled_projection_dim, width, width, "silu")
        self.context_embedder = Linear(params.joint_attention_dim, width)
        self.blocks = nn.ModuleList(Sd3Block(params, index) for index in range(params.num_layers))
        self.norm_out = Linear(width, 2 * width)
        self.proj_out = Linear(width, area * (params.out_channels or params.in_channels))

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def prepare(self, text: Tensor, pooled: Tensor) -> Sd3Context:
        """Text [B, L, joint] and its pooled vector [B, P] to what `forward` reads of them."""
        return Sd3Context(
            self.context_embedder(text.to(self.dtype)), self.text_embedder(pooled.to(self.dtype))
        )

    def forward(self, latents: Tensor, timestep: Tensor, context: Sd3Context) -> Tensor:
        """Velocity [B, C, 1, h, w] in the model's dtype, of latents [B, C, 1, h, w].

        `timestep` [B] counts from 0 (clean) to 1000 (noise), one per row.
        """
        grid = token_grid(latents, self.params.patch)
        image = self._embed([latents], [grid])
        text = context.text
        signal = self._signal(timestep, context)

        for block in self.blocks:
            image, text = block(image, text, signal, self.attention.tokens)
        return self._finish(image, signal, grid)

    def packed(
        self, latents: Sequence[Tensor], timestep: Tensor, context: Sd3Context
    ) -> list[Tensor]:
        """`forward` of rows [1, C, 1, h, w] of different sizes, in one pass."""
        grids = [token_grid(x, self.params.patch) for x in latents]
        image = self._embed(latents, grids)
        rows, length = context.text.shape[:2]
        text = context.text.flatten(0, 1)[None]
        signal = self._signal(timestep, context)

        kinds = Packing(image.device, [math.prod(grid) for grid in grids], [length] * rows)
        images = Packing(image.device, kinds.kinds[0])
        own = kinds.rows.split([image.shape[1], text.shape[1]])
        together, last = kinds.among(self.attention), kinds.from_first(self.attention)
        apart = images.among(self.attention)
        for block in self.blocks:
            attend = last if block is self.blocks[-1] else together
            image, text = block(image, text, signal, attend, apart, own)

        ends = zip(images.split(image), signal.split(1), grids, strict=True)
        return [self._finish(row, own, grid) for row, own, grid in ends]

    def _embed(self, latents: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Image tokens [B, S, D]; of several latents one behind the other."""
        patch = self.params.patch
        patches = torch.cat([patchify(x.to(self.dtype), patch) for x in latents], dim=1)
        positions = torch.cat([self.position(grid) for grid in grids], dim=1)
        return (self.patch_embedding(patches) + positions).to(self.dtype)

    def _signal(self, timestep: Tensor, context: Sd3Context) -> Tensor:
        """[B, D], what modulates the blocks."""
        wave = sinusoid(timestep, TIME_CHANNELS).to(self.dtype)
        return functional.silu(self.time_embedder(wave) + context.vector)

    def _finish(self, image: Tensor, signal: Tensor, grid: Grid) -> Tensor:
        scale, shift = self.norm_out(signal).chunk(2, dim=-1)
        image = ops.norm_modulate(image, scale, shift, eps=EPS)
        return unpatchify(self.proj_out(image), grid, self.params.patch)


class PositionTable(nn.Module):
    """One vector per place of the largest picture; a smaller one takes the middle."""

    def __init__(self, params: Sd3Params) -> None:
        super().__init__()
        self.size = params.pos_embed_max_size
        self.pos_embed = nn.Parameter(torch.empty(1, self.size**2, params.width))

    def forward(self, grid: Grid) -> Tensor:
        _, height, width = grid
        assert height <= self.size and width <= self.size, f"{grid} is larger than {self.size}"
        top, left = (self.size - height) // 2, (self.size - width) // 2
        table = self.pos_embed.unflatten(1, (self.size, self.size))
        return table[:, top : top + height, left : left + width].flatten(1, 2)


class Sd3Block(nn.Module):
    def __init__(self, params: Sd3Params, index: int) -> None:
        super().__init__()
        self.heads = params.num_attention_heads
        self.dual = index in params.dual_attention_layers
        self.image = Stream(params, 9 if self.dual else 6)
        self.attn2 = SelfAttention(params) if self.dual else None
        last = index == params.num_layers - 1
        self.text = Stream(params, 2 if last else 6)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        signal: Tensor,
        attend: Attend,
        attend_image: Attend | None = None,
        rows: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """`attend_image` is for the image alone, if that is another; `rows` says whose row each
        token is, of the image and of the text, where rows are packed."""
        on_image, on_text = (
            per_token(stream.modulation(signal), own)
            .unflatten(-1, (-1, image.shape[-1]))
            .unbind(-2)
            for stream, own in zip((self.image, self.text), rows, strict=True)
        )
        # The last block's text is only read: its two parts are scale and shift.
        shift, scale = on_text[:2] if self.text.updates else (on_text[1], on_text[0])
        joint = torch.cat(
            (
                self.image.to_qkv(ops.norm_modulate(image, on_image[1], on_image[0], eps=EPS)),
                self.text.to_qkv(ops.norm_modulate(text, scale, shift, eps=EPS)),
            ),
            dim=1,
        )
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.image.to_qkv.split(joint))
        length = image.shape[1]
        self.image.norm(q[:, :length], k[:, :length])
        self.text.norm(q[:, length:], k[:, length:])
        y = attend(q if self.text.updates else q[:, :length], k, v).flatten(2)
        again = None
        if self.attn2 is not None:
            normed = ops.norm_modulate(image, on_image[7], on_image[6], eps=EPS)
            again = self.attn2(normed, attend_image or attend)
        image = self.image.update(image, y[:, :length], on_image, again)
        if self.text.updates:
            text = self.text.update(text, y[:, length:], on_text)
        return image, text


class Normed(nn.Module):
    """Queries and keys of one kind of token, normalised per head where the model does that."""

    def __init__(self, params: Sd3Params) -> None:
        super().__init__()
        width, head_dim = params.width, params.attention_head_dim
        self.to_qkv = Linear(width, {"q": width, "k": width, "v": width})
        self.norm_q = nn.RMSNorm(head_dim) if params.qk_norm else None
        self.norm_k = nn.RMSNorm(head_dim) if params.qk_norm else None

    def norm(self, q: Tensor, k: Tensor) -> None:
        if self.norm_q is not None and self.norm_k is not None:
            ops.qk_norm_rope_(q, k, self.norm_q.weight, self.norm_k.weight, eps=EPS, norm="head")


class SelfAttention(Normed):
    """The second attention of a block, of the image to itself."""

    def __init__(self, params: Sd3Params) -> None:
        super().__init__(params)
        self.heads = params.num_attention_heads
        self.to_out = Linear(params.width, params.width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        parts = self.to_qkv.split(self.to_qkv(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        self.norm(q, k)
        return self.to_out(attend(q, k, v).flatten(2))


class Stream(Normed):
    """The half of a block that belongs to one kind of token; `parts` of modulation."""

    def __init__(self, params: Sd3Params, parts: int) -> None:
        super().__init__(params)
        width = params.width
        self.updates = parts > 2
        self.modulation = Linear(width, parts * width)
        self.to_out = Linear(width, width) if self.updates else None
        self.mlp = Mlp(width, 4 * width, width, "gelu_tanh") if self.updates else None

    def update(
        self, x: Tensor, y: Tensor, modulation: Sequence[Tensor], again: Tensor | None = None
    ) -> Tensor:
        """The residual stream after attention's result `y`, that of the second attention, and the
        perceptron."""
        assert self.to_out is not None and self.mlp is not None
        gate, shift, scale, gate_mlp = modulation[2:6]
        y = self.to_out(y)
        if again is not None:
            x = ops.gate_residual(x, y, gate)
            y, gate = again, modulation[8]
        x, y = ops.gate_residual_norm_modulate(x, y, gate, scale, shift, eps=EPS)
        return ops.gate_residual(x, self.mlp(y), gate_mlp, out=x)
