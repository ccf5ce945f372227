"""Wan video transformer (arXiv 2503.20314): text-to-video, Wan-AI/Wan2.1-T2V-*-Diffusers.

Shapes: B rows (independent jobs, each at its own timestep), C latent channels, T/h/w latent
frames/rows/columns, S = T*h*w / patch tokens in order t, y, x, D = H*d hidden width of H heads, L
text tokens, N blocks.

Precision: the residual stream is in the model's dtype; norms, modulation and gated updates compute
in fp32 and round once; the parameters named in KEEP_FP32 stay fp32 in every precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.attention import Attend, AttentionContext
from sgl_diffusion.attention.sdpa import SdpaBackend
from sgl_diffusion.layers.embed import (
    patchify,
    rope_tables,
    sinusoid,
    token_grid,
    unpatchify,
)
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.mlp import Mlp
from sgl_diffusion.models.params import read_params


@dataclass(frozen=True)
class WanParams:
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_widths(self) -> tuple[int, int, int]:
        """Channels of a head that rotate with the frame, the row and the column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WanParams:
        """From config.json."""
        # A config may leave the output channels open.
        out = config.get("out_channels") or config.get("in_channels", 16)
        return read_params(cls, {**config, "out_channels": out}, only=_ONLY, what="Wan transformer")


# Config values that change the computation, with the one value this file computes.
_ONLY: Mapping[str, Any] = {
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


@dataclass(frozen=True)
class TextContext:
    """What the blocks read of the prompts: keys and values [N, 2, B, L, H, d], for all steps."""

    kv: Tensor

    @staticmethod
    def cat(contexts: Sequence[TextContext]) -> TextContext:
        """Prompts of several jobs as one batch."""
        return TextContext(torch.cat([context.kv for context in contexts], dim=2))

    def rows(self) -> list[TextContext]:
        """The batch as single prompts, each keeping a batch axis of 1."""
        return [TextContext(kv) for kv in self.kv.split(1, dim=2)]


class WanTransformer(nn.Module):
    KEEP_FP32 = ("time_embedder", "scale_shift_table", "norm2")

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.params = params
        self.attention = AttentionContext.on_one_rank(SdpaBackend())
        width = params.width
        self.patch_embedding = Linear(params.in_channels * math.prod(params.patch_size), width)
        self.time_embedder = Mlp(params.freq_dim, width, width, "silu")
        self.time_proj = Linear(width, 6 * width)
        self.text_embedder = Mlp(params.text_dim, width, width, "gelu_tanh")
        self.blocks = nn.ModuleList(WanBlock(params) for _ in range(params.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))
        self.proj_out = Linear(width, params.out_channels * math.prod(params.patch_size))

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def prepare(self, text: Tensor) -> TextContext:
        """Text embeddings [B, L, text_dim] to what `forward` reads of them, once for all steps."""
        text = self.text_embedder(text.to(self.dtype))
        blocks = cast("Iterable[WanBlock]", self.blocks)
        return TextContext(torch.stack([block.attn2.keys_values(text) for block in blocks]))

    def forward(self, latents: Tensor, timestep: Tensor, context: TextContext) -> Tensor:
        """Velocity [B, C, T, h, w] in the model's dtype, of latents [B, C, T, h, w].

        `timestep` [B] counts from 0 (clean) to 1000 (noise), one per row; [B, S] gives each token
        its own.
        """
        params = self.params
        grid = token_grid(latents, params.patch_size)
        rope = rope_tables(grid, params.rope_widths, latents.device)
        x = self.patch_embedding(patchify(latents.to(self.dtype), params.patch_size))
        temb, modulation = self._embed_time(timestep)

        for block, kv in zip(self.blocks, context.kv, strict=True):
            x = block(x, modulation, kv, rope, self.attention)

        shift, scale = _modulation(self.scale_shift_table, temb.unsqueeze(-2))
        x = ops.norm_modulate(x, scale, shift, eps=params.eps)
        return unpatchify(self.proj_out(x), grid, params.patch_size)

    def _embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding [B, D] and the blocks' modulation [B, 6, D] (per token: [B, S, ...])."""
        temb = self.time_embedder(sinusoid(timestep, self.params.freq_dim)).to(self.dtype)
        return temb, self.time_proj(functional.silu(temb)).unflatten(-1, (6, -1))


class WanBlock(nn.Module):
    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.eps = params.eps
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, params.width))
        self.attn1 = WanSelfAttention(params)
        self.norm2 = nn.LayerNorm(params.width, params.eps) if params.cross_attn_norm else None
        self.attn2 = WanCrossAttention(params)
        self.ffn = Mlp(params.width, params.ffn_dim, params.width, "gelu_tanh")

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        kv: Tensor,
        rope: tuple[Tensor, Tensor],
        attention: AttentionContext,
    ) -> Tensor:
        shift_1, scale_1, gate_1, shift_3, scale_3, gate_3 = _modulation(
            self.scale_shift_table, modulation
        )
        # tokens among themselves
        y = ops.norm_modulate(x, scale_1, shift_1, eps=self.eps)
        y = self.attn1(y, rope, attention.tokens)
        x, y = self._update(x, y, gate_1)

        # tokens with the text; from here on x is this block's own and updated in place
        y = self.attn2(y, kv, attention.local)
        x, y = ops.gate_residual_norm_modulate(x, y, None, scale_3, shift_3, eps=self.eps, out=x)

        # each token alone
        return ops.gate_residual(x, self.ffn(y), gate_3, out=x)

    def _update(self, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The residual after self-attention, and what cross-attention reads of it."""
        if self.norm2 is None:
            x = ops.gate_residual(x, y, gate)
            return x, x
        return ops.gate_residual_norm_modulate(
            x, y, gate, weight=self.norm2.weight, bias=self.norm2.bias, eps=self.eps
        )


class WanSelfAttention(nn.Module):
    """Attention among the tokens; queries and keys are normalised over the full width."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        width = params.width
        self.heads, self.eps = params.num_attention_heads, params.eps
        self.to_qkv = Linear(width, {"q": width, "k": width, "v": width})
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.to_out = Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)) for part in self.to_qkv.split(self.to_qkv(x))
        )
        ops.qk_norm_rope_(
            q, k, self.norm_q.weight, self.norm_k.weight, *rope, eps=self.eps, norm="full"
        )
        return self.to_out(attend(q, k, v).flatten(2))


class WanCrossAttention(nn.Module):
    """Attention to the text, without rotation; `keys_values` makes its keys once per prompt."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        width = params.width
        self.heads, self.eps = params.num_attention_heads, params.eps
        self.to_q = Linear(width, width)
        self.to_kv = Linear(width, {"k": width, "v": width})
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.to_out = Linear(width, width)

    def keys_values(self, text: Tensor) -> Tensor:
        """[B, L, D] -> [2, B, L, H, d]."""
        k, v = self.to_kv.split(self.to_kv(text))
        k = ops.norm_modulate(k, weight=self.norm_k.weight, eps=self.eps, kind="rms")
        return torch.stack((k, v)).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, kv: Tensor, attend: Attend) -> Tensor:
        q = ops.norm_modulate(
            self.to_q(x), weight=self.norm_q.weight, eps=self.eps, kind="rms"
        ).unflatten(-1, (self.heads, -1))
        return self.to_out(attend(q, *kv).flatten(2))


def _modulation(table: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
    """A learned table [1, n, D] plus an embedding [B, n or 1, D] in fp32, as n of [B, D]."""
    return (table + embedding.float()).unbind(-2)
