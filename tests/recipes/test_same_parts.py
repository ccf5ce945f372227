"""Repositories that name a relative of a pipeline class: the same parts, the same recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.recipes.registry import NATIVE, SAME_PARTS, open_pipeline
from tests.recipes.parity import opened, run

# A tiny checkpoint of each class that others share the parts of.
TINY = {
    "Flux2KleinPipeline": "tiny_flux2_klein",
    "FluxKontextPipeline": "tiny_kontext",
    "FluxPipeline": "tiny_flux_b",
    "QwenImagePipeline": "tiny_qwen_image_a",
    "StableDiffusion3Pipeline": "tiny_sd3_b",
    "ZImagePipeline": "tiny_z_image_a",
}
CALL = {"prompt": "a red fox", "width": 64, "height": 48, "num_inference_steps": 2}


@pytest.mark.parametrize("relative", [r for r, known in SAME_PARTS.items() if known in TINY])
def test_a_relative_is_served_by_the_same_recipe(
    relative: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(TINY[SAME_PARTS[relative]])
    copy = Path(shutil.copytree(path, tmp_path / "model"))
    index = json.loads((copy / "model_index.json").read_text())
    index["_class_name"] = relative
    (copy / "model_index.json").write_text(json.dumps(index))
    ours, plain = opened(copy), opened(path)
    assert ours.card.backend == "native" and ours.card.defaults == plain.card.defaults
    call = {**CALL, "max_sequence_length": 64}
    assert torch.equal(run(ours, **call)[0], run(plain, **call)[0])
    # By name, diffusers gets the class that the repository asks for.
    options = EngineOptions(model_path=str(copy), backend="diffusers")
    assert open_pipeline(options, lambda note: None).card.pipeline_class == relative


def test_relatives_are_classes_of_diffusers_with_the_same_parts() -> None:
    import inspect

    import diffusers

    def parts(name: str) -> set[str]:
        return set(inspect.signature(getattr(diffusers, name).__init__).parameters)

    for relative, known in SAME_PARTS.items():
        assert known in NATIVE and relative not in NATIVE
        assert parts(relative) == parts(known), relative
