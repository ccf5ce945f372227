"""The norm as a sum of squares equals the library's, also where all channels are zero."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from sgl_diffusion.components.channel_norm import use_sums


@pytest.mark.parametrize("images", [True, False])
def test_values_equal_the_library(images: bool) -> None:
    norm = WanRMS_norm(5, images=images, bias=True)
    torch.nn.init.normal_(norm.gamma)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, *([7, 9] if images else [3, 7, 9])) * 100
    x[:, :, 0] = 0
    fast = copy.deepcopy(norm)
    use_sums(fast)
    assert "forward" in vars(fast)
    truth = norm.double()(x.double())
    assert torch.allclose(fast(x).double(), truth, rtol=1e-5, atol=1e-6)


def test_half_precision_is_left_to_the_library() -> None:
    norm = WanRMS_norm(5).bfloat16()
    use_sums(norm)
    assert "forward" not in vars(norm)
