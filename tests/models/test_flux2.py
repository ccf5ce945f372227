"""Our FLUX.2 transformer against diffusers' on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.models.flux2 import Flux2Context, Flux2Params, Flux2Transformer
from sgl_diffusion.models.flux2_weights import RULES
from tests.checkpoints.tiny_flux2 import build
from tests.models.parity import assert_as_exact, assert_close, load, load_theirs

Models = tuple[Flux2Transformer, Any]
GUIDANCE = 4.0


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> Flux2Transformer:
    return load(Flux2Transformer, Flux2Params, RULES, path, dtype)


@pytest.fixture(scope="module", params=["tiny_flux2_dev", "tiny_flux2_klein_base"])
def models(request: pytest.FixtureRequest) -> Models:
    path: Path = request.getfixturevalue(request.param)
    return load_transformer(path), load_theirs("Flux2Transformer2DModel", path)


def inputs(rows: int, height: int, width: int, references: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(height * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "latents": draw(rows, 16, 1, height, width),
        "timestep": torch.tensor([999.0, 421.3, 7.0])[:rows],
        "text": draw(rows, 11, 96),
        "references": [draw(rows, 16, 1, 4 + 2 * i, 6) for i in range(references)],
    }


@torch.no_grad()
def run_theirs(model: Any, given: dict[str, Any]) -> Tensor:
    from diffusers import Flux2Pipeline

    dtype = model.x_embedder.weight.dtype
    latents, references, text = given["latents"], given["references"], given["text"]
    rows, _, _, height, width = latents.shape
    packed = [Flux2Pipeline._pack_latents(x[:, :, 0]) for x in (latents, *references)]
    ids = [Flux2Pipeline._prepare_latent_ids(latents[:, :, 0])]
    if references:
        first = [x[:1, :, 0] for x in references]
        ids.append(Flux2Pipeline._prepare_image_ids(first).expand(rows, -1, -1))
    output = model(
        hidden_states=torch.cat(packed, dim=1).to(dtype),
        encoder_hidden_states=text.to(dtype),
        timestep=given["timestep"] / 1000,
        img_ids=torch.cat(ids, dim=1),
        txt_ids=Flux2Pipeline._prepare_text_ids(text),
        guidance=torch.full((rows,), GUIDANCE) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    result: Tensor = output[:, : height * width].transpose(1, 2)
    return result.unflatten(-1, (1, height, width))


@torch.no_grad()
def run_ours(model: Flux2Transformer, given: dict[str, Any]) -> Tensor:
    context = model.prepare(given["text"], GUIDANCE, given["references"])
    return model(given["latents"], given["timestep"], context)


@pytest.mark.parametrize("references", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 2)])
def test_forward_equals_diffusers(models: Models, height: int, width: int, references: int) -> None:
    ours, theirs = models
    given = inputs(2, height, width, references)
    expected = run_theirs(theirs, given)
    got = run_ours(ours, given)
    assert_close(got, expected)


@pytest.mark.parametrize(("heads", "width"), [(2, 16), (1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernels_run_and_are_as_exact(
    tmp_path: Path, heads: int, width: int, dtype: torch.dtype
) -> None:
    """Head dim 64 and 128."""
    path = build(tmp_path / "model", heads=heads, axes=(width,) * 4, klein=True)
    exact = load_theirs("Flux2Transformer2DModel", path)
    given = inputs(3, 3, 5, 1)
    ours = load_transformer(path, dtype)
    used = assert_as_exact(ours, exact, given, run_ours, run_theirs, dtype)
    assert {"norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "silu_mul"} <= used


def test_rows_in_a_batch_equal_rows_alone(models: Models) -> None:
    ours, _ = models
    given = inputs(3, 3, 5, 1)
    together = run_ours(ours, given)
    contexts = []
    for row in range(3):
        one = {k: v[row : row + 1] for k, v in given.items() if k != "references"}
        one["references"] = [r[row : row + 1] for r in given["references"]]
        alone = run_ours(ours, one)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        contexts.append(ours.prepare(one["text"], GUIDANCE, one["references"]))
    joined = ours(given["latents"], given["timestep"], Flux2Context.cat(contexts))
    torch.testing.assert_close(joined, together, atol=1e-5, rtol=1e-5)


def test_a_config_that_computes_something_else_is_refused(tiny_flux2_dev: Path) -> None:
    config = read_config(tiny_flux2_dev / "transformer")
    with pytest.raises(ConfigError, match="patch_size"):
        Flux2Params.from_config({**config, "patch_size": 2})
