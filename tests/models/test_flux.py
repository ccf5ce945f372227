"""Our FLUX.1 transformer against diffusers' on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.models.flux import FluxContext, FluxParams, FluxTransformer
from sgl_diffusion.models.flux_weights import RULES
from tests.checkpoints.tiny_flux import build
from tests.models.parity import assert_as_exact, assert_close, load, load_theirs

Models = tuple[FluxTransformer, Any]
GUIDANCE = 3.5


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> FluxTransformer:
    return load(FluxTransformer, FluxParams, RULES, path, dtype)


@pytest.fixture(scope="module", params=["tiny_flux_a", "tiny_flux_b"])
def models(request: pytest.FixtureRequest) -> Models:
    path: Path = request.getfixturevalue(request.param)
    return load_transformer(path), load_theirs("FluxTransformer2DModel", path)


def inputs(rows: int, height: int, width: int, references: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(height * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "latents": draw(rows, 16, 1, height, width),
        "timestep": torch.tensor([999.0, 421.3, 7.0])[:rows],
        "text": draw(rows, 11, 32),
        "pooled": draw(rows, 32),
        "references": [draw(rows, 16, 1, 4 + 2 * i, 6) for i in range(references)],
    }


@torch.no_grad()
def run_theirs(model: Any, given: dict[str, Any]) -> Tensor:
    from diffusers import FluxPipeline

    dtype = model.x_embedder.weight.dtype

    def pack(x: Tensor) -> Tensor:
        rows, channels, _, height, width = x.shape
        return FluxPipeline._pack_latents(x[:, :, 0], rows, channels, height, width)

    def ids(x: Tensor, first: int) -> Tensor:
        grid = (x.shape[3] // 2, x.shape[4] // 2)
        table = FluxPipeline._prepare_latent_image_ids(1, *grid, "cpu", torch.float32)
        table[:, 0] = first
        return table

    latents, references = given["latents"], given["references"]
    packed = torch.cat([pack(x) for x in (latents, *references)], dim=1)
    tables = [ids(latents, 0), *(ids(x, 1) for x in references)]
    rows, _, _, height, width = latents.shape
    output = model(
        hidden_states=packed.to(dtype),
        encoder_hidden_states=given["text"].to(dtype),
        pooled_projections=given["pooled"].to(dtype),
        timestep=given["timestep"] / 1000,
        img_ids=torch.cat(tables),
        txt_ids=torch.zeros(given["text"].shape[1], 3),
        guidance=torch.full((rows,), GUIDANCE) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    tokens = height * width // 4
    result: Tensor = FluxPipeline._unpack_latents(output[:, :tokens], 8 * height, 8 * width, 8)
    return result[:, :, None]


@torch.no_grad()
def run_ours(model: FluxTransformer, given: dict[str, Any]) -> Tensor:
    context = model.prepare(given["text"], given["pooled"], GUIDANCE, given["references"])
    return model(given["latents"], given["timestep"], context)


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(6, 10), (8, 4)])
def test_forward_equals_diffusers(models: Models, height: int, width: int, references: int) -> None:
    ours, theirs = models
    given = inputs(2, height, width, references)
    expected = run_theirs(theirs, given)
    got = run_ours(ours, given)
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("heads", "head_dim", "axes"), [(2, 64, (16, 24, 24)), (1, 128, (16, 56, 56))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernels_run_and_are_as_exact(
    tmp_path: Path, heads: int, head_dim: int, axes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    path = build(tmp_path / "model", heads=heads, head_dim=head_dim, axes=axes)
    exact = load_theirs("FluxTransformer2DModel", path)
    given = inputs(3, 6, 10, 1)
    ours = load_transformer(path, dtype)
    used = assert_as_exact(ours, exact, given, run_ours, run_theirs, dtype)
    assert {"norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "gelu_tanh"} <= used


def test_rows_in_a_batch_equal_rows_alone(models: Models) -> None:
    ours, _ = models
    given = inputs(3, 6, 10, 1)
    together = run_ours(ours, given)
    contexts = []
    for row in range(3):
        one = {k: v[row : row + 1] for k, v in given.items() if k != "references"}
        one["references"] = [r[row : row + 1] for r in given["references"]]
        alone = run_ours(ours, one)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        contexts.append(ours.prepare(one["text"], one["pooled"], GUIDANCE, one["references"]))
    joined = ours(given["latents"], given["timestep"], FluxContext.cat(contexts))
    torch.testing.assert_close(joined, together, atol=1e-5, rtol=1e-5)


def test_a_config_that_computes_something_else_is_refused(tiny_flux_a: Path) -> None:
    config = read_config(tiny_flux_a / "transformer")
    with pytest.raises(ConfigError, match="patch_size"):
        FluxParams.from_config({**config, "patch_size": 2})
