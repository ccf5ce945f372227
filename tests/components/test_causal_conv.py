"""A first frame alone needs one tap in time; everything else takes the library's way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sgl_diffusion.components.causal_conv import use_last_tap

KINDS = [WanCausalConv3d, QwenImageCausalConv3d]


def ran(conv: Any, *inputs: Tensor) -> tuple[Tensor, set[tuple[int, ...]]]:
    """What it gives, and the shapes that were convolved."""
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen,
    ):
        out = conv(*inputs)
    events = seen.key_averages(group_by_input_shape=True)
    return out, {tuple(e.input_shapes[0]) for e in events if e.key == "aten::mkldnn_convolution"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, 1), ((3, 1, 1), 1, (1, 0, 0)), ((3, 3, 5), (1, 2, 1), (1, 1, 2))],
)
def test_one_frame_is_convolved_in_two_dimensions(
    kind: Any, kernel: Any, stride: Any, padding: Any
) -> None:
    conv = kind(4, 6, kernel, stride, padding)
    x = torch.randn(2, 4, 1, 7, 9)
    with torch.inference_mode():
        want = conv(x)
    use_last_tap(conv)
    got, shapes = ran(conv, x)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5
    assert shapes == {(2, 4, 7, 9)}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_that_have_others_before_them_see_them(kind: Any) -> None:
    conv = kind(4, 6, 3, padding=1)
    x, before = torch.randn(1, 4, 3, 7, 9), torch.randn(1, 4, 2, 7, 9)
    with torch.inference_mode():
        want = conv(x), conv(x[:, :, :1], before), conv(x[:, :, :1], before[:, :, :1])
    use_last_tap(conv)
    with torch.inference_mode():
        got = conv(x), conv(x[:, :, :1], before), conv(x[:, :, :1], before[:, :, :1])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_one_tap_or_no_zeros_before_it_is_left_alone(kind: Any) -> None:
    for conv in (kind(4, 4, 1), kind(4, 4, (3, 1, 1)), kind(4, 4, 3, padding=1).bfloat16()):
        use_last_tap(conv)
        assert "forward" not in vars(conv)
