"""Sinusoids, patches and rotary tables against diffusers and plain definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sgl_diffusion.layers.embed import (
    join_ropes,
    patchify,
    rope_tables,
    sinusoid,
    unpatchify,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("channels", [2, 64, 256])
def test_sinusoid_equals_diffusers(channels: int) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 499.0, 999.0])
    expected = get_timestep_embedding(t, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoid(t, channels), expected, atol=0, rtol=0)


def test_sinusoid_keeps_leading_axes() -> None:
    t = torch.arange(6).reshape(2, 3)
    assert torch.equal(sinusoid(t, 8)[1, 2], sinusoid(t[1, 2], 8))


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_patchify_is_a_convolution(patch: tuple[int, int, int]) -> None:
    video = torch.randn(2, 3, 4, 6, 6)
    weight = torch.randn(5, 3, *patch)
    expected = functional.conv3d(video, weight, stride=patch).flatten(2).transpose(1, 2)
    got = patchify(video, patch) @ weight.flatten(1).T
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_unpatchify_puts_every_value_in_its_place() -> None:
    grid, patch, channels = (2, 3, 4), (1, 2, 3), 5
    video = torch.randn(2, channels, 2, 6, 12)
    patches = patchify(video, patch)
    channels_last = patches.unflatten(-1, (channels, -1)).transpose(-1, -2).flatten(-2)
    assert torch.equal(patchify(video, patch, channels="last"), channels_last)
    assert torch.equal(unpatchify(channels_last, grid, patch), video)
    assert torch.equal(unpatchify(patches, grid, patch, channels="first"), video)


@pytest.mark.parametrize(("head_dim", "widths"), [(16, (8, 4, 4)), (128, (44, 42, 42))])
def test_rope_tables_equal_diffusers(head_dim: int, widths: tuple[int, int, int]) -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    grid = (5, 3, 7)
    cos, sin = rope_tables(grid, widths, CPU)
    rope = WanRotaryPosEmbed(head_dim, (1, 1, 1), 64)
    expected_cos, expected_sin = rope(torch.empty(1, 1, *grid))
    assert torch.equal(cos, expected_cos[0, :, 0, 0::2])
    assert torch.equal(sin, expected_sin[0, :, 0, 1::2])


def test_rope_positions_count_from_the_origin() -> None:
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    widths, grid, origin = (4, 6, 6), (1, 3, 5), (2, -1, 7)
    ids = torch.cartesian_prod(*(torch.arange(s, s + n) for s, n in zip(origin, grid, strict=True)))
    expected_cos, expected_sin = FluxPosEmbed(theta=10000, axes_dim=widths)(ids)
    cos, sin = rope_tables(grid, widths, CPU, origin=origin)
    assert torch.equal(cos, expected_cos[:, 0::2])
    assert torch.equal(sin, expected_sin[:, 1::2])


def test_joined_ropes_follow_each_other() -> None:
    first, second = (rope_tables(grid, (4, 4), CPU) for grid in ((2, 3), (1, 4)))
    cos, sin = join_ropes(first, second)
    assert torch.equal(cos, torch.cat((first[0], second[0])))
    assert torch.equal(sin, torch.cat((first[1], second[1])))
