"""Our own models under the names of diffusers."""

from __future__ import annotations

import math

import torch

from sgl_diffusion.loader.adapters.table import table_of
from sgl_diffusion.models.wan import WanParams, WanTransformer
from sgl_diffusion.models.wan_weights import RULES
from tests.loader.adapters.tiny import CONFIGS, shapes

WAN = "WanTransformer3DModel"


def test_wan_has_the_table_of_diffusers() -> None:
    """But for what only image-to-video models have, and a convolution that is a matrix here."""
    config = {**CONFIGS[WAN], "image_dim": None, "added_kv_proj_dim": None}
    with torch.device("meta"):
        model = WanTransformer(WanParams.from_config(config))
    ours = table_of(model, RULES)
    theirs = {
        key: shape
        for key, shape in shapes(WAN).items()
        if not any(part in key for part in ("image_embedder", "add_", "norm_added"))
    }
    assert ours.keys() == theirs.keys()
    for key, shape in theirs.items():
        matrix = (shape[0], math.prod(shape[1:])) if key == "patch_embedding.weight" else shape
        assert ours[key] == matrix
