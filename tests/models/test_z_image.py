"""Our Z-Image transformer against diffusers' on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.models.z_image import ZImageContext, ZImageParams, ZImageTransformer
from sgl_diffusion.models.z_image_weights import RULES
from tests.checkpoints.tiny_z_image import build
from tests.models.parity import assert_as_exact, assert_close, load, load_theirs

Given = tuple[Tensor, Tensor, list[Tensor]]
Models = tuple[ZImageTransformer, Any]


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> ZImageTransformer:
    return load(ZImageTransformer, ZImageParams, RULES, path, dtype)


@pytest.fixture(scope="module", params=["tiny_z_image_a", "tiny_z_image_b"])
def models(request: pytest.FixtureRequest) -> Models:
    path: Path = request.getfixturevalue(request.param)
    return load_transformer(path), load_theirs("ZImageTransformer2DModel", path)


def inputs(height: int, width: int, lengths: list[int]) -> Given:
    """Captions of different lengths; 35 tokens are filled up to 64, where 7 and 32 stay at 32."""
    generator = torch.Generator().manual_seed(height * width)
    latents = torch.randn(len(lengths), 16, 1, height, width, generator=generator)
    captions = [torch.randn(1, length, 64, generator=generator) for length in lengths]
    return latents, torch.tensor([999.0, 421.3, 7.0])[: len(lengths)], captions


@torch.no_grad()
def run_theirs(model: Any, given: Given) -> Tensor:
    latents, timestep, captions = given
    dtype = model.t_embedder.mlp[0].weight.dtype
    outputs = model(
        list(latents.to(dtype).unbind()),
        (1000 - timestep) / 1000,
        [caption[0].to(dtype) for caption in captions],
        return_dict=False,
    )[0]
    return -torch.stack(list(outputs))


@torch.no_grad()
def run_ours(model: ZImageTransformer, given: Given) -> Tensor:
    latents, timestep, captions = given
    context = ZImageContext.cat([model.prepare(caption) for caption in captions])
    return model(latents, timestep, context)


@pytest.mark.parametrize("lengths", [[7], [7, 32], [35, 7, 40]])
@pytest.mark.parametrize(("height", "width"), [(6, 10), (8, 16), (14, 10)])
def test_forward_equals_diffusers(
    models: Models, height: int, width: int, lengths: list[int]
) -> None:
    """On pictures whose tokens fill a multiple of 32, and on others."""
    ours, theirs = models
    given = inputs(height, width, lengths)
    expected = run_theirs(theirs, given)
    got = run_ours(ours, given)
    assert_close(got, expected)


@pytest.mark.parametrize(("heads", "axes"), [(2, (16, 24, 24)), (1, (32, 48, 48))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernels_run_and_are_as_exact(
    tmp_path: Path, heads: int, axes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Head dim 64 and 128."""
    path = build(tmp_path / "model", heads=heads, axes=axes)
    exact = load_theirs("ZImageTransformer2DModel", path)
    given = inputs(6, 10, [35, 7, 40])
    ours = load_transformer(path, dtype)
    used = assert_as_exact(ours, exact, given, run_ours, run_theirs, dtype)
    assert {"norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "silu_mul"} <= used


def test_a_config_that_computes_something_else_is_refused(tiny_z_image_a: Path) -> None:
    config = read_config(tiny_z_image_a / "transformer")
    with pytest.raises(ConfigError, match="qk_norm=False"):
        ZImageParams.from_config({**config, "qk_norm": False})
