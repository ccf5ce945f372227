"""oneDNN's convolutions equal torch's, and are the ones that run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sgl_diffusion.components.conv3d import use_onednn


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding", "groups"),
    [(3, 3, 1, 1, 1), (8, (3, 1, 1), (2, 1, 1), 0, 1), (8, 1, 1, 0, 2), (1, (1, 3, 3), 1, 2, 1)],
)
def test_values_equal_fp64(
    channels: int, kernel: object, stride: object, padding: object, groups: int
) -> None:
    conv = nn.Conv3d(channels, 8, kernel, stride, padding, groups=groups)  # type: ignore[arg-type]
    x = torch.randn(1, channels, 5, 7, 9)
    truth = nn.functional.conv3d(
        x.double(),
        conv.weight.double(),
        conv.bias.double() if conv.bias is not None else None,
        conv.stride,
        conv.padding,
        groups=groups,
    )
    use_onednn(conv)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        out = conv(x)
    assert (out - truth).abs().max() < 1e-5
    names = {event.key for event in seen.key_averages()}
    assert "aten::mkldnn_convolution" in names and "aten::slow_conv3d_forward" not in names


def test_other_convolutions_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv3d(2, 2, 1, padding_mode="circular"),
        nn.Conv3d(2, 2, 1).bfloat16(),
        nn.Conv2d(2, 2, 1),
    )
    use_onednn(model)
    assert all("_conv_forward" not in vars(module) for module in model)
