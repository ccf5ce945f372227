"""Three-dimensional convolutions on the CPU, always through oneDNN.

torch keeps small ones, by the size of the input, on a loop of its own that is two to seven times
slower (docs/measured.md); VAEs with few channels fall below that line.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def use_onednn(model: nn.Module) -> None:
    """Redirect every plain fp32 Conv3d of a model on the CPU; others stay as they are."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if isinstance(module, nn.Conv3d) and _plain(module):
            module._conv_forward = partial(_forward, module)  # type: ignore[method-assign]


def _plain(conv: nn.Conv3d) -> bool:
    weight = conv.weight
    zero_padding = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return zero_padding and weight.device.type == "cpu" and weight.dtype == torch.float32


def _forward(conv: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.aten.mkldnn_convolution(
        x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups
    )
