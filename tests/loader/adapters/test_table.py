"""Our own models under the names of diffusers: the same parameters, whatever is fused in ours."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch

from sgl_diffusion.loader.adapters.table import table_of
from sgl_diffusion.models import (
    flux,
    flux_weights,
    qwen_image,
    qwen_image_weights,
    sd3,
    sd3_weights,
    wan,
    wan_weights,
    z_image,
    z_image_weights,
)
from tests.loader.adapters.tiny import CONFIGS

MODELS = {
    "WanTransformer3DModel": (wan.WanTransformer, wan.WanParams, wan_weights.RULES),
    "FluxTransformer2DModel": (flux.FluxTransformer, flux.FluxParams, flux_weights.RULES),
    "SD3Transformer2DModel": (sd3.Sd3Transformer, sd3.Sd3Params, sd3_weights.RULES),
    "QwenImageTransformer2DModel": (
        qwen_image.QwenImageTransformer,
        qwen_image.QwenImageParams,
        qwen_image_weights.RULES,
    ),
    "ZImageTransformer2DModel": (
        z_image.ZImageTransformer,
        z_image.ZImageParams,
        z_image_weights.RULES,
    ),
}
# What only image-to-video models have; the native Wan is text-to-video.
OPTIONS = {"WanTransformer3DModel": {"image_dim": None, "added_kv_proj_dim": None}}


@pytest.mark.parametrize("name", MODELS)
def test_tables_are_those_of_diffusers(name: str) -> None:
    own, params, rules = MODELS[name]
    config = {**CONFIGS[name], **OPTIONS.get(name, {})}
    with torch.device("meta"):
        theirs = getattr(diffusers, name)(**config)
        ours = own(params.from_config(json.loads(theirs.to_json_string())))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    table = table_of(ours, rules)
    assert table.keys() == shapes.keys()
    for key, shape in shapes.items():
        # A convolution whose kernel is its stride is a matrix in our models.
        assert table[key] in (shape, (shape[0], math.prod(shape[1:])))
