"""Fused linear layers."""

from __future__ import annotations

import torch

from sgl_diffusion.layers.linear import Linear


def test_segments_are_the_rows_of_the_parts() -> None:
    fused = Linear(6, {"q": 4, "k": 4, "v": 10})
    x = torch.randn(2, 3, 6)
    assert fused.weight.shape == (18, 6)
    for (_, rows), part in zip(fused.segments.items(), fused.split(fused(x)), strict=True):
        expected = torch.nn.functional.linear(x, fused.weight[rows], fused.bias[rows])
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-6)
    assert [part.shape[-1] for part in fused.split(fused(x))] == [4, 4, 10]


def test_a_plain_layer_is_one_segment() -> None:
    plain = Linear(3, 5, bias=False)
    assert plain.segments == {"": slice(0, 5)}
    assert plain.bias is None
