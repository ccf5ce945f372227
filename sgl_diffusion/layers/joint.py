"""One kind of token in a block where two kinds keep weights of their own and attend together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sgl_diffusion import ops
from sgl_diffusion.layers.embed import Rope
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.mlp import Mlp
from sgl_diffusion.layers.packing import per_token

# Which tokens, and their shift, scale and gate before attention and before the perceptron.
Modulated = tuple[slice, tuple[Tensor, ...]]


class JointStream(nn.Module):
    """AdaLN-Zero modulation, fused projections with norms per head, and a perceptron.

    The tokens may come in parts that are modulated differently (`Modulated`); most models have one.
    """

    def __init__(self, width: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = Linear(width, 6 * width)
        self.to_qkv = Linear(width, {"q": width, "k": width, "v": width})
        self.norm_q = nn.RMSNorm(head_dim)
        self.norm_k = nn.RMSNorm(head_dim)
        self.to_out = Linear(width, width)
        self.mlp = Mlp(width, 4 * width, width, "gelu_tanh")

    def modulate(
        self, signal: Tensor, tokens: slice = slice(None), rows: Tensor | None = None
    ) -> Modulated:
        """The modulation of these tokens by an embedding [B, D]; `rows` [S] says whose row each
        token is, where rows are packed."""
        return tokens, per_token(self.modulation(signal), rows).chunk(6, dim=-1)

    def project(self, x: Tensor, parts: Sequence[Modulated]) -> Tensor:
        """Tokens [B, S, D], normalised and modulated, to queries, keys and values [B, S, 3D]."""
        normed = [
            ops.norm_modulate(x[:, tokens], scale, shift, eps=self.eps)
            for tokens, (shift, scale, *_) in parts
        ]
        return self.to_qkv(_joined(normed))

    def rotate(self, q: Tensor, k: Tensor, rope: Rope) -> None:
        """Norm and rotation of [B, S, H, d], in place."""
        weights = (self.norm_q.weight, self.norm_k.weight)
        ops.qk_norm_rope_(q, k, *weights, *rope, eps=self.eps, norm="head")

    def update(self, x: Tensor, y: Tensor, parts: Sequence[Modulated]) -> Tensor:
        """The residual stream [B, S, D] after attention's result `y` and the perceptron."""
        y = self.to_out(y)
        both = [
            ops.gate_residual_norm_modulate(
                x[:, tokens], y[:, tokens], gate, scale, shift, eps=self.eps
            )
            for tokens, (_, _, gate, shift, scale, _) in parts
        ]
        y = self.mlp(_joined([normed for _, normed in both]))
        return _joined(
            [
                ops.gate_residual(residual, y[:, tokens], gate, out=residual)
                for (residual, _), (tokens, (*_, gate)) in zip(both, parts, strict=True)
            ]
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
