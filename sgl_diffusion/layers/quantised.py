"""Linear layers whose weights take one byte a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.ops.quant import quant_fp8_rowwise
from sgl_diffusion.ops.quantised_linear import (
    MULTIPLE,
    linear_fp8,
    linear_int8,
    quant_int8_rowwise,
)


@dataclass(frozen=True)
class Format:
    """How weights are kept, and the product with them."""

    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


FORMATS = {
    "fp8": Format(quant_fp8_rowwise, linear_fp8),
    "int8": Format(quant_int8_rowwise, linear_int8),
}


class QuantisedLinear(Linear):
    """In the place of a `Linear`, with its segments; adapters are applied to its output."""

    scale: Tensor

    def __init__(self, plain: Linear, weight: Tensor, name: str) -> None:
        """`weight` is that of `plain`, in full precision; `name` is one of the formats."""
        nn.Module.__init__(self)  # without room for a weight in full precision
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.segments = plain.segments
        self._format = FORMATS[name]
        values, scale = self._format.quantise(weight)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        return self._format.linear(x, self.weight, self.scale, self.bias)


def can_be_quantised(layer: nn.Module) -> bool:
    """Whether the kernels take its sizes."""
    if type(layer) is not Linear:
        return False
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def quantised_bytes(layer: Linear) -> int:
    """Of its weight with the scales."""
    return layer.in_features * layer.out_features + layer.out_features * torch.float32.itemsize
