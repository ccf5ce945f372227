"""Our Stable Diffusion 3 transformer against diffusers' on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.models.sd3 import Sd3Context, Sd3Params, Sd3Transformer
from sgl_diffusion.models.sd3_weights import RULES
from tests.checkpoints.tiny_sd3 import build
from tests.models.parity import assert_as_exact, assert_close, load, load_theirs

Given = tuple[Tensor, Tensor, Tensor, Tensor]


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> Sd3Transformer:
    return load(Sd3Transformer, Sd3Params, RULES, path, dtype)


@pytest.fixture(scope="module", params=["tiny_sd3_a", "tiny_sd3_b"])
def models(request: pytest.FixtureRequest) -> tuple[Sd3Transformer, Any]:
    path: Path = request.getfixturevalue(request.param)
    return load_transformer(path), load_theirs("SD3Transformer2DModel", path)


def inputs(rows: int, height: int, width: int) -> Given:
    generator = torch.Generator().manual_seed(height * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    timestep = torch.tensor([999.0, 421.3, 7.0])[:rows]
    return draw(rows, 16, 1, height, width), timestep, draw(rows, 11, 64), draw(rows, 56)


@torch.no_grad()
def run_theirs(model: Any, given: Given) -> Tensor:
    latents, timestep, text, pooled = given
    dtype = model.proj_out.weight.dtype
    output: Tensor = model(
        latents[:, :, 0].to(dtype), text.to(dtype), pooled.to(dtype), timestep, return_dict=False
    )[0]
    return output[:, :, None]


@torch.no_grad()
def run_ours(model: Sd3Transformer, given: Given) -> Tensor:
    latents, timestep, text, pooled = given
    return model(latents, timestep, model.prepare(text, pooled))


@pytest.mark.parametrize(("height", "width"), [(6, 10), (8, 4), (24, 22)])
def test_forward_equals_diffusers(
    models: tuple[Sd3Transformer, Any], height: int, width: int
) -> None:
    ours, theirs = models
    given = inputs(2, height, width)
    expected = run_theirs(theirs, given)
    got = run_ours(ours, given)
    assert_close(got, expected)


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (1, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernels_run_and_are_as_exact(
    tmp_path: Path, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    path = build(tmp_path / "model", heads=heads, head_dim=head_dim)
    exact = load_theirs("SD3Transformer2DModel", path)
    given = inputs(3, 6, 10)
    ours = load_transformer(path, dtype)
    used = assert_as_exact(ours, exact, given, run_ours, run_theirs, dtype)
    assert {"norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "gelu_tanh"} <= used


def test_rows_in_a_batch_equal_rows_alone(models: tuple[Sd3Transformer, Any]) -> None:
    ours, _ = models
    given = inputs(3, 6, 10)
    together = run_ours(ours, given)
    contexts = []
    for row in range(3):
        one = tuple(part[row : row + 1] for part in given)
        alone = run_ours(ours, one)  # type: ignore[arg-type]
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        contexts.append(ours.prepare(one[2], one[3]))
    joined = ours(given[0], given[1], Sd3Context.cat(contexts))
    torch.testing.assert_close(joined, together, atol=1e-5, rtol=1e-5)


def test_a_config_that_computes_something_else_is_refused(tiny_sd3_a: Path) -> None:
    config = read_config(tiny_sd3_a / "transformer")
    with pytest.raises(ConfigError, match="qk_norm='layer_norm'"):
        Sd3Params.from_config({**config, "qk_norm": "layer_norm"})
