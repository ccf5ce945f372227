"""Causal convolutions of the Wan and Qwen-Image VAEs on the CPU, for the first frame alone.

What comes before the first frame is zeros. The library writes them and multiplies by them, which is
two thirds of a convolution with three taps in time; here the last tap works alone, in two
dimensions. Pictures have only a first frame (docs/measured.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def use_last_tap(model: nn.Module) -> None:
    """Redirect the causal fp32 convolutions of such a VAE on the CPU; others stay as they are."""
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if isinstance(module, WanCausalConv3d | QwenImageCausalConv3d) and _plain(module):
            module.forward = partial(_forward, module, module.forward)


def _plain(conv: Any) -> bool:
    """Whether the last of its taps is where a lonely frame is."""
    weight = conv.weight
    before = conv._padding[4] == conv.kernel_size[0] - 1 > 0
    return before and weight.device.type == "cpu" and weight.dtype == torch.float32


def _forward(conv: Any, usual: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if cache_x is not None or x.shape[2] > 1:
        result: Tensor = usual(x, cache_x)
        return result
    columns, _, rows, *_ = conv._padding
    return torch.ops.aten.mkldnn_convolution(
        x[:, :, 0],
        conv.weight[:, :, -1],
        conv.bias,
        (rows, columns),
        conv.stride[1:],
        conv.dilation[1:],
        conv.groups,
    ).unsqueeze(2)
