"""Adapters on the served image models, merged and per request, against diffusers with PEFT."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.engine.lora.control import lora_control
from sgl_diffusion.engine.pipeline import Pipeline
from tests.engine.bench import Bench
from tests.engine.lora.adapters import prepare
from tests.oracles import images as oracle
from tests.recipes.parity import opened, unpacked

CALL = {"width": 64, "height": 48, "num_inference_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "tiny_flux_a": {"guidance_scale": 3.5, "max_sequence_length": 64},
    "tiny_sd3_a": {"guidance_scale": 4.0, "max_sequence_length": 64, "negative_prompt": "grey"},
    "tiny_z_image_a": {"guidance_scale": 0.0},
    "tiny_qwen_image_a": {"true_cfg_scale": 2.0, "negative_prompt": "grey"},
    "tiny_flux2_dev": {"guidance_scale": 3.0, "max_sequence_length": 160},
    "tiny_flux2_klein_base": {"guidance_scale": 3.0, "max_sequence_length": 160},
    "tiny_kontext": {"guidance_scale": 3.5, "max_sequence_length": 64},
}
# Else diffusers makes the picture a megapixel.
ORACLE: dict[str, dict[str, Any]] = {"tiny_kontext": {"max_area": 64 * 48}}
# Those that diffusers' own loader of the family knows.
COMPONENTS = [
    ("tiny_flux_a", ("transformer", "text_encoder")),
    ("tiny_flux_a", ("text_encoder",)),
    ("tiny_sd3_a", ("transformer", "text_encoder", "text_encoder_2")),
    ("tiny_sd3_a", ("text_encoder_2",)),
    ("tiny_z_image_a", ("transformer",)),
    ("tiny_qwen_image_a", ("transformer",)),
    ("tiny_flux2_dev", ("transformer",)),
    ("tiny_flux2_klein_base", ("transformer",)),
    ("tiny_kontext", ("transformer", "text_encoder")),
]
PROMPT = "a red fox in the snow"


def _write(pipe: Any, components: tuple[str, ...], path: Path) -> Path:
    """An adapter on every linear layer of some components, in the names of diffusers."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for component in components:
        for name, layer in getattr(pipe, component).named_modules():
            if isinstance(layer, nn.Linear) and name != "text_projection":
                down = torch.randn(2, layer.in_features, generator=generator)
                up = 0.1 * torch.randn(layer.out_features, 2, generator=generator)
                tensors[f"{component}.{name}.lora_A.weight"] = down / layer.in_features**0.5
                tensors[f"{component}.{name}.lora_B.weight"] = up
    save_file(tensors, path)
    return path


def _want(pipe: Any, call: dict[str, Any]) -> Tensor:
    latents, _ = oracle.run(pipe, PROMPT, seed=3, **call)
    size = (call["height"] // 8, call["width"] // 8)
    return unpacked(latents, like=torch.empty(1, 1, 1, *size))


def _run(bench: Bench, name: str) -> Tensor:
    bench.run()
    assert not bench.errors
    return bench.latents[name][0]


@pytest.mark.parametrize(("checkpoint", "components"), COMPONENTS)
def test_merged_and_per_request_equal_diffusers(
    checkpoint: str, components: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(checkpoint)
    call = {**CALL, **CASES[checkpoint]}
    pipe = oracle.pipeline(folder)
    path = _write(pipe, components, tmp_path / "a.safetensors")
    theirs = {**call, **ORACLE.get(checkpoint, {})}
    base = _want(pipe, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(path), adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    wanted = _want(pipe, theirs)
    assert (wanted - base).abs().max() > 0.01, "the adapter shows"

    pipeline: Pipeline = opened(folder)
    bench = Bench(pipeline)
    control = lora_control(pipeline, bench.runner, EngineOptions(), None, lambda note: None)
    assert control.manager is not None
    pipeline.card = dataclasses.replace(pipeline.card, lora_targets=control.targets)
    prepare(control.manager, LoraSetting(nickname="a", path=str(path)))
    (listed,) = control.manager.report()["loaded_adapters"]
    assert not listed["unmatched"]

    uses = (LoraUse(nickname="a", strength=0.7),)
    job = bench.add("own", prompt=PROMPT, seed=3, num_frames=1, loras=uses, **call)
    job.blend = control.blend(uses)
    found = {"own": _run(bench, "own")}
    control.manager.replace([LoraSetting(nickname="a", strength=0.7)], "merge")
    bench.add("merged", prompt=PROMPT, seed=3, num_frames=1, **call)
    found["merged"] = _run(bench, "merged")
    control.manager.unmerge("all")
    bench.add("base", prompt=PROMPT, seed=3, num_frames=1, **call)
    found["base"] = _run(bench, "base")
    for name, latents in found.items():
        expected = base if name == "base" else wanted
        assert (latents - expected).abs().max() <= 1e-4, name
