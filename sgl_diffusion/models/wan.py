"""Wan video transformer (arXiv 2503.20314): Wan-AI/Wan2.1-*-Diffusers and Wan2.2-*-Diffusers.

Shapes: B rows (independent jobs, each at its own timestep), C latent channels, T/h/w latent
frames/rows/columns, S = T*h*w / patch tokens in order t, y, x, D = H*d hidden width of H heads, L
text tokens, I tokens of an input picture, N blocks.

Precision: the residual stream is in the model's dtype; norms, modulation and gated updates compute
in fp32 and round once; the parameters named in KEEP_FP32 stay fp32 in every precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.attention import Attend, AttentionContext
from sgl_diffusion.attention.sdpa import SdpaBackend
from sgl_diffusion.layers.embed import (
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
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None

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
_ONLY: Mapping[str, Any] = {"qk_norm": "rms_norm_across_heads"}


# Attention to keys that stand for several is that to all of them, up to this share of their number
# (docs/measured.md): beyond it the other one, whose scores nothing is added to, is faster.
_FOLDED, _FOLDED_FP32 = 0.27, 0.6


@dataclass(frozen=True)
class TextContext:
    """What the blocks read of the prompts, and of a picture where the model sees one: keys and
    values [N, 2, B, L, H, d] and [N, 2, B, I, H, d], for all steps.

    With `repeats` [B, L] keys of the text stand for several equal ones: the logarithms of how many.
    They stand for `length` keys then.
    """

    kv: Tensor
    image_kv: Tensor | None = None
    repeats: Tensor | None = None
    length: int = 0

    @staticmethod
    def cat(contexts: Sequence[TextContext]) -> TextContext:
        """Prompts of several jobs as one batch: with padding as one key while that is faster."""
        images = [context.image_kv for context in contexts if context.image_kv is not None]
        keys = max(context.kv.shape[3] for context in contexts)
        lengths = {context.length for context in contexts}
        share = _FOLDED_FP32 if contexts[0].kv.dtype == torch.float32 else _FOLDED
        whole = len(lengths) == 1 and keys > share * max(lengths)
        texts = [context._stretched(max(keys, *lengths) if whole else keys) for context in contexts]
        repeats = [text.repeats for text in texts if text.repeats is not None and not whole]
        return TextContext(
            torch.cat([text.kv for text in texts], dim=2),
            torch.cat(images, dim=2) if images else None,
            torch.cat(repeats) if repeats else None,
            max(lengths) if repeats else 0,
        )

    def _stretched(self, length: int) -> TextContext:
        """With so many keys: the last one is several that stand for as many as it did."""
        more = length - self.kv.shape[3]
        if self.repeats is None or more == 0:
            return self
        kv = torch.cat((self.kv, _last(self.kv, more)), dim=3)
        shares = (self.repeats[:, -1:] - math.log(more + 1)).expand(-1, more + 1)
        repeats = torch.cat((self.repeats[:, :-1], shares), dim=1)
        return TextContext(kv, self.image_kv, repeats, self.length)


class WanTransformer(nn.Module):
    KEEP_FP32 = ("time_embedder", "scale_shift_table", "norm1", "norm2")
    # Of its blocks, what `prepare` reads before the first step.
    BESIDE_BLOCKS = ("attn2.to_kv", "attn2.to_image_kv", "attn2.norm_k", "attn2.norm_image_k")

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.params = params
        self.attention = AttentionContext.on_one_rank(SdpaBackend())
        width = params.width
        self.patch_embedding = Linear(params.in_channels * math.prod(params.patch_size), width)
        self.time_embedder = Mlp(params.freq_dim, width, width, "silu")
        self.time_proj = Linear(width, 6 * width)
        self.text_embedder = Mlp(params.text_dim, width, width, "gelu_tanh")
        self.image_embedder = None if params.image_dim is None else ImageEmbedder(params)
        self.blocks = nn.ModuleList(WanBlock(params) for _ in range(params.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))
        self.proj_out = Linear(width, params.out_channels * math.prod(params.patch_size))

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def prepare(
        self, text: Tensor, image: Tensor | None = None, length: int | None = None
    ) -> TextContext:
        """Text embeddings [B, L, text_dim], and states [B, I, image_dim] of a picture where the
        model sees one, to what `forward` reads of them, once for all steps.

        With a `length` the text goes on with zeros up to it. What becomes of one is computed once,
        and stays one key where attention knows keys that stand for several.
        """
        more = 0 if length is None else length - text.shape[1]
        if more:
            text = functional.pad(text, (0, 0, 0, 1))
        text = self.text_embedder(text.to(self.dtype))
        blocks = cast("Sequence[WanBlock]", self.blocks)
        kv = torch.stack([block.attn2.keys_values(text) for block in blocks])
        repeats, whole = None, 0
        if length is not None and self.attention.repeated is not None:
            whole, repeats = length, torch.zeros(kv.shape[2:4], device=kv.device)
            repeats[:, -1] = math.log(max(more, 1))
        elif more:
            kv = torch.cat((kv, _last(kv, more - 1)), dim=3)
        image_kv = None
        if self.image_embedder is not None and image is not None:
            image = self.image_embedder(image.to(self.dtype))
            image_kv = torch.stack([block.attn2.image_keys_values(image) for block in blocks])
        return TextContext(kv, image_kv, repeats, whole)

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

        images = context.image_kv if context.image_kv is not None else [None] * len(context.kv)
        for block, kv, image_kv in zip(self.blocks, context.kv, images, strict=True):
            x = block(x, modulation, kv, context.repeats, image_kv, rope, self.attention)

        shift, scale = _modulation(self.scale_shift_table, temb.unsqueeze(-2))
        x = ops.norm_modulate(x, scale, shift, eps=params.eps)
        return unpatchify(self.proj_out(x), grid, params.patch_size)

    def packed(
        self, latents: Sequence[Tensor], timestep: Tensor, context: TextContext
    ) -> list[Tensor]:
        """`forward` of rows [1, C, T, h, w] of different sizes in one pass, without pictures."""
        assert context.image_kv is None, "rows that see a picture are not packed"
        patch, widths = self.params.patch_size, self.params.rope_widths
        grids = [token_grid(x, patch) for x in latents]
        rope = join_ropes(*(rope_tables(grid, widths, timestep.device) for grid in grids))
        x = torch.cat([patchify(x.to(self.dtype), patch) for x in latents], dim=1)
        x = self.patch_embedding(x)
        tokens = Packing(x.device, [math.prod(grid) for grid in grids])
        temb, modulation = self._embed_time(timestep)

        rows, length = context.kv.shape[2:4]
        attention = AttentionContext(
            tokens.among(self.attention),
            tokens.to([length] * rows, self.attention),
            repeated=tokens.to_repeated(self.attention),
        )
        modulation = tokens.spread(modulation)
        for block, kv in zip(self.blocks, context.kv.flatten(2, 3).unsqueeze(2), strict=True):
            x = block(x, modulation, kv, context.repeats, None, rope, attention)

        shift, scale = _modulation(self.scale_shift_table, temb.unsqueeze(-2))
        x = ops.norm_modulate(x, tokens.spread(scale), tokens.spread(shift), eps=self.params.eps)
        ends = zip(tokens.split(self.proj_out(x)), grids, strict=True)
        return [unpatchify(row, grid, patch) for row, grid in ends]

    def _embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding [B, D] and the blocks' modulation [B, 6, D] (per token: [B, S, ...])."""
        temb = self.time_embedder(sinusoid(timestep, self.params.freq_dim)).to(self.dtype)
        return temb, self.time_proj(functional.silu(temb)).unflatten(-1, (6, -1))


class ImageEmbedder(nn.Module):
    """States of a picture [B, I, image_dim] to the width of the text; two pictures follow each
    other and are told apart by a table of positions."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        dim, length = params.image_dim or 0, params.pos_embed_seq_len
        self.pos_embed = None if length is None else nn.Parameter(torch.empty(1, length, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.linear_1 = Linear(dim, dim)
        self.linear_2 = Linear(dim, params.width)
        self.norm2 = nn.LayerNorm(params.width)

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = functional.gelu(self.linear_1(_layer_norm(self.norm1, x)))
        return _layer_norm(self.norm2, self.linear_2(x))


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
        repeats: Tensor | None,
        image_kv: Tensor | None,
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

        # tokens with text and picture; from here on x is this block's own and updated in place
        y = self.attn2(y, kv, repeats, image_kv, attention)
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
    """Attention to the text, and beside it to a picture, without rotation; their keys are made once
    per job."""

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        width, added = params.width, params.added_kv_proj_dim
        self.heads, self.eps = params.num_attention_heads, params.eps
        self.to_q = Linear(width, width)
        self.to_kv = Linear(width, {"k": width, "v": width})
        self.norm_q = nn.RMSNorm(width)
        self.norm_k = nn.RMSNorm(width)
        self.to_image_kv = None if added is None else Linear(added, {"k": width, "v": width})
        self.norm_image_k = None if added is None else nn.RMSNorm(width)
        self.to_out = Linear(width, width)

    def keys_values(self, text: Tensor) -> Tensor:
        """[B, L, D] -> [2, B, L, H, d]."""
        return self._pair(self.to_kv, self.norm_k, text)

    def image_keys_values(self, image: Tensor) -> Tensor:
        """[B, I, D] -> [2, B, I, H, d]."""
        assert self.to_image_kv is not None and self.norm_image_k is not None
        return self._pair(self.to_image_kv, self.norm_image_k, image)

    def forward(
        self,
        x: Tensor,
        kv: Tensor,
        repeats: Tensor | None,
        image_kv: Tensor | None,
        attention: AttentionContext,
    ) -> Tensor:
        q = self._norm(self.norm_q, self.to_q(x)).unflatten(-1, (self.heads, -1))
        if repeats is None:
            y = attention.local(q, *kv)
        else:
            assert attention.repeated is not None, "the prompts were made for another attention"
            y = attention.repeated(q, kv[0], kv[1], repeats)
        if image_kv is not None:
            y = y + attention.local(q, *image_kv)
        return self.to_out(y.flatten(2))

    def _pair(self, linear: Linear, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        k, v = linear.split(linear(x))
        return torch.stack((self._norm(norm, k), v)).unflatten(-1, (self.heads, -1))

    def _norm(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        return ops.norm_modulate(x, weight=norm.weight, eps=self.eps, kind="rms")


def _last(kv: Tensor, times: int) -> Tensor:
    """Its last key so many times."""
    return kv[:, :, :, -1:].expand(-1, -1, -1, times, -1, -1)


def _modulation(table: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
    """A learned table [1, n, D] plus an embedding [B, n or 1, D] in fp32, as n of [B, D]."""
    return (table + embedding.float()).unbind(-2)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return ops.norm_modulate(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)
