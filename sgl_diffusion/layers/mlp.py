"""The two-layer perceptron of transformers and embedders."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.layers.linear import Linear


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        activation: Literal["gelu_tanh", "silu"],
    ) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, hidden)
        self.activation = ops.gelu_tanh if activation == "gelu_tanh" else functional.silu
        self.linear_2 = Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))
