"""Our Qwen-Image transformer against diffusers' on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.models.qwen_image import QwenImageContext, QwenImageParams, QwenImageTransformer
from sgl_diffusion.models.qwen_image_weights import RULES
from tests.checkpoints.tiny_qwen_image import build
from tests.models.parity import assert_as_exact, assert_close, load, load_theirs

Models = tuple[QwenImageTransformer, Any]


def load_transformer(path: Path, dtype: torch.dtype = torch.float32) -> QwenImageTransformer:
    return load(QwenImageTransformer, QwenImageParams, RULES, path, dtype)


def both(path: Path) -> Models:
    return load_transformer(path), load_theirs("QwenImageTransformer2DModel", path)


@pytest.fixture(scope="module", params=["tiny_qwen_image_a", "tiny_qwen_image_b", "clean"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    if request.param == "clean":
        folder = tmp_path_factory.mktemp("models") / "clean-references"
        return both(build(folder, zero_cond_t=True, seed=9))
    return both(request.getfixturevalue(request.param))


def inputs(height: int, width: int, lengths: list[int], references: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(height * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = len(lengths)
    return {
        "latents": draw(rows, 16, 1, height, width),
        "timestep": torch.tensor([999.0, 421.3, 7.0])[:rows],
        "texts": [draw(1, length, 64) for length in lengths],
        "references": [draw(rows, 16, 1, 4 + 2 * i, 6) for i in range(references)],
    }


@torch.no_grad()
def run_theirs(model: Any, given: dict[str, Any]) -> Tensor:
    from diffusers import QwenImagePipeline

    dtype = model.img_in.weight.dtype

    def pack(x: Tensor) -> Tensor:
        rows, channels, _, height, width = x.shape
        return QwenImagePipeline._pack_latents(x, rows, channels, height, width)

    latents, references = given["latents"], given["references"]
    rows, _, _, height, width = latents.shape
    longest = max(text.shape[1] for text in given["texts"])
    text, mask = torch.zeros(rows, longest, 64), torch.zeros(rows, longest)
    for row, one in enumerate(given["texts"]):
        text[row, : one.shape[1]], mask[row, : one.shape[1]] = one[0], 1
    shapes = [(1, x.shape[3] // 2, x.shape[4] // 2) for x in (latents, *references)]
    output = model(
        torch.cat([pack(x) for x in (latents, *references)], dim=1).to(dtype),
        encoder_hidden_states=text.to(dtype),
        encoder_hidden_states_mask=None if mask.all() else mask,
        timestep=given["timestep"] / 1000,
        img_shapes=[shapes] * rows,
        return_dict=False,
    )[0]
    output = output[:, : height * width // 4]
    return QwenImagePipeline._unpack_latents(output, 8 * height, 8 * width, 8)


@torch.no_grad()
def run_ours(model: QwenImageTransformer, given: dict[str, Any]) -> Tensor:
    contexts = [
        model.prepare(text, [r[row : row + 1] for r in given["references"]])
        for row, text in enumerate(given["texts"])
    ]
    return model(given["latents"], given["timestep"], QwenImageContext.cat(contexts))


@pytest.mark.parametrize("references", [0, 2])
@pytest.mark.parametrize("lengths", [[9], [9, 9], [5, 12, 1]])
@pytest.mark.parametrize(("height", "width"), [(6, 10), (14, 4)])
def test_forward_equals_diffusers(
    models: Models, height: int, width: int, lengths: list[int], references: int
) -> None:
    ours, theirs = models
    given = inputs(height, width, lengths, references)
    expected = run_theirs(theirs, given)
    got = run_ours(ours, given)
    assert_close(got, expected)


@pytest.mark.parametrize(("heads", "axes"), [(2, (16, 24, 24)), (1, (16, 56, 56))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_kernels_run_and_are_as_exact(
    tmp_path: Path, heads: int, axes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Head dim 64 and 128."""
    path = build(tmp_path / "model", heads=heads, axes=axes)
    _, exact = both(path)
    given = inputs(6, 10, [5, 12, 1], 1)
    ours = load_transformer(path, dtype)
    used = assert_as_exact(ours, exact, given, run_ours, run_theirs, dtype)
    assert {"norm_modulate", "gate_residual_norm_modulate", "qk_norm_rope", "gelu_tanh"} <= used


def test_a_config_that_computes_something_else_is_refused(tiny_qwen_image_a: Path) -> None:
    config = read_config(tiny_qwen_image_a / "transformer")
    with pytest.raises(ConfigError, match="use_layer3d_rope=True"):
        QwenImageParams.from_config({**config, "use_layer3d_rope": True})
