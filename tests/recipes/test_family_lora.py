"""Adapters on every native pipeline class, merged and per request, against diffusers with PEFT."""

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
from tests.engine.bench import Bench
from tests.engine.lora.adapters import prepare
from tests.recipes import parity
from tests.recipes.matrix import PROMPTS, ROWS, Sides, checkpoint

# The text encoders that diffusers' own loader of the class knows.
TEXT = {
    "FLUX.1": ("text_encoder",),
    "FLUX.1 Kontext": ("text_encoder",),
    "SD3": ("text_encoder", "text_encoder_2"),
}
# Of classes that share a transformer the one that asks most of it; the others are slow.
QUICK = ("Wan 2.1 I2V", "FLUX.1", "FLUX.2 dev", "Qwen-Image-Edit", "SD3", "Z-Image Omni")
CASES = [
    pytest.param(
        name,
        ("transformer", *TEXT.get(name, ())),
        marks=[] if name in QUICK else [pytest.mark.slow],
        id=name,
    )
    for name in ROWS
]
CASES += [
    pytest.param("FLUX.1", ("text_encoder",), id="FLUX.1 text"),
    pytest.param("SD3", ("text_encoder_2",), id="SD3 text"),
]


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


def _load(pipe: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(str(path), adapter_name="a")
        if getattr(pipe, "transformer_2", None) is not None:
            pipe.load_lora_weights(str(path), adapter_name="a", load_into_transformer_2=True)
    pipe.set_adapters(["a"], [0.7])


class Ours:
    def __init__(self, sides: Sides, path: Path) -> None:
        pipeline = sides.ours
        self.bench = Bench(pipeline)
        self.control = lora_control(
            pipeline, self.bench.runner, EngineOptions(), None, lambda note: None
        )
        assert self.control.manager is not None
        self.manager = self.control.manager
        pipeline.card = dataclasses.replace(pipeline.card, lora_targets=self.control.targets)
        prepare(self.manager, LoraSetting(nickname="a", path=str(path)))

    def latents(self, name: str, *uses: LoraUse, **call: Any) -> Tensor:
        job = self.bench.add(name, prompt=PROMPTS["long"], seed=11, loras=uses, **call)
        job.blend = self.control.blend(uses)
        self.bench.run()
        assert not self.bench.errors
        return self.bench.latents[name][0]


@pytest.mark.parametrize(("name", "components"), CASES)
def test_merged_and_per_request_equal_diffusers(
    name: str,
    components: tuple[str, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = ROWS[name]
    parity.small_references(monkeypatch)
    sides = Sides(row, checkpoint(row, 0, request, tmp_path / "model"), tmp_path)
    call = sides.call(row.sizes[0], 5 if 5 in row.frames else 1, row.on)
    pictures = row.pictures[-1]
    path = _write(sides.theirs, components, tmp_path / "a.safetensors")
    base = sides.expected(PROMPTS["long"], pictures, **call)
    _load(sides.theirs, path)
    wanted = sides.expected(PROMPTS["long"], pictures, **call)
    assert (wanted - base).abs().max() > 0.01, "the adapter shows"

    ours = Ours(sides, path)
    (listed,) = ours.manager.report()["loaded_adapters"]
    assert not listed["unmatched"]
    call["images"] = sides.files(pictures)
    found = {"own": ours.latents("own", LoraUse(nickname="a", strength=0.7), **call)}
    ours.manager.replace([LoraSetting(nickname="a", strength=0.7)], "merge")
    found["merged"] = ours.latents("merged", **call)
    ours.manager.unmerge("all")
    found["base"] = ours.latents("base", **call)
    for way, latents in found.items():
        expected = parity.unpacked(base if way == "base" else wanted, like=latents)
        assert latents.shape == expected.shape
        assert (latents - expected).abs().max() <= 1e-4, way
