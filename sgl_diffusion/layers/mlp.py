"""The two-layer perceptron of transformers and embedders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.layers.linear import Linear

# In place: the hidden tensor is the largest of a block, and nobody else has it.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: ops.gelu_tanh(x, out=x),
    "silu": lambda x: functional.silu(x, inplace=True),
}


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        activation: Literal["gelu_tanh", "silu"],
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, hidden, bias)
        self.activation = activation
        self.linear_2 = Linear(hidden, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(ACTIVATIONS[self.activation](self.linear_1(x)))
