"""Our Z-Image Omni transformer against diffusers' on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.models.z_image import ZImageParams
from sgl_diffusion.models.z_image_omni import OmniContext, ZImageOmniTransformer
from sgl_diffusion.models.z_image_weights import RULES
from tests.checkpoints.tiny_z_image import build
from tests.models.parity import assert_as_exact, assert_close, load, load_theirs

Models = tuple[ZImageOmniTransformer, Any]
Row = tuple[list[Tensor], list[Tensor], list[Tensor]]  # pieces of text, references, what is seen
Given = tuple[Tensor, Tensor, list[Row]]


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> ZImageOmniTransformer:
    return load(ZImageOmniTransformer, ZImageParams, RULES, path, dtype)


@pytest.fixture(scope="module", params=["tiny_z_image_omni_a", "tiny_z_image_omni_b"])
def models(request: pytest.FixtureRequest) -> Models:
    path: Path = request.getfixturevalue(request.param)
    return load_transformer(path), load_theirs("ZImageTransformer2DModel", path)


def inputs(height: int, width: int, lengths: list[int], references: int) -> Given:
    """Texts of different lengths in pieces; pictures of other sizes than the new one."""
    generator = torch.Generator().manual_seed(height * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = draw(len(lengths), 16, 1, height, width)
    shown = [draw(1, 16, 1, 6 + 4 * i, 10) for i in range(references)]
    seen = [draw(4, 3 + 8 * i, 48) for i in range(references)]
    rows: list[Row] = []
    for length in lengths:
        counts = [5, *[2] * (references - 1), length, 3] if references else [length]
        rows.append(([draw(1, count, 64) for count in counts], shown, seen))
    return latents, torch.tensor([999.0, 421.3, 7.0])[: len(lengths)], rows


@torch.no_grad()
def run_theirs(model: Any, given: Given) -> Tensor:
    latents, timestep, rows = given
    dtype = model.t_embedder.mlp[0].weight.dtype
    outputs = model(
        [
            [*(picture[0].to(dtype) for picture in shown), row]
            for (_, shown, _), row in zip(rows, latents.to(dtype), strict=True)
        ],
        (1000 - timestep) / 1000,
        [[piece[0].to(dtype) for piece in pieces] for pieces, _, _ in rows],
        siglip_feats=[
            [*(view.to(dtype) for view in seen), None] if seen else None for _, _, seen in rows
        ],
        image_noise_mask=[[0] * len(shown) + [1] for _, shown, _ in rows],
        return_dict=False,
    )[0]
    return -torch.stack(list(outputs))


@torch.no_grad()
def run_ours(model: ZImageOmniTransformer, given: Given) -> Tensor:
    latents, timestep, rows = given
    context = OmniContext.cat([model.prepare(*row) for row in rows])
    return model(latents, timestep, context)


@pytest.mark.parametrize("lengths", [[7], [7, 8], [35, 7, 40]])
@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(6, 10), (8, 16)])
def test_forward_equals_diffusers(
    models: Models, height: int, width: int, references: int, lengths: list[int]
) -> None:
    ours, theirs = models
    given = inputs(height, width, lengths, references)
    assert_close(run_ours(ours, given), run_theirs(theirs, given))


@pytest.mark.parametrize(("heads", "axes"), [(2, (16, 24, 24)), (1, (32, 48, 48))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernels_run_and_are_as_exact(
    tmp_path: Path, heads: int, axes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Head dim 64 and 128."""
    path = build(tmp_path / "model", heads=heads, axes=axes, omni=True)
    exact = load_theirs("ZImageTransformer2DModel", path)
    given = inputs(6, 10, [35, 7, 40], 1)
    ours = load_transformer(path, dtype)
    used = assert_as_exact(ours, exact, given, run_ours, run_theirs, dtype)
    assert {"norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "silu_mul"} <= used
