"""Transformers with weights of one byte: which layers, how large, how near, and with adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, RequestError
from sgl_diffusion.engine.footprint.trials import measure
from sgl_diffusion.engine.lora.checks import pick_mode
from sgl_diffusion.engine.lora.fit import Fitted, Place, Source
from sgl_diffusion.engine.lora.rows import make_blend
from sgl_diffusion.engine.pipeline import AdaptablePipeline, Pipeline
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.layers.quantised import QuantisedLinear
from sgl_diffusion.loader.adapters.types import Adapter, LowRank
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench

FAMILIES = [
    "tiny_flux_a",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ["tiny_wan_a", "tiny_flux2_klein", "tiny_qwen_image_a", "tiny_sd3_a"]
    ),
    pytest.param("tiny_z_image_a", marks=pytest.mark.slow),
]


def opened(path: Path, quantization: str = "none", **options: object) -> Pipeline:
    chosen = EngineOptions(model_path=str(path), quantization=quantization, **options)  # type: ignore[arg-type]
    pipeline = open_pipeline(chosen, lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


def transformer(pipeline: Pipeline) -> torch.nn.Module:
    assert isinstance(pipeline, AdaptablePipeline)
    return pipeline.adaptables()["transformer"].module


def latents(pipeline: Pipeline, blend: object = None, steps: int = 2) -> torch.Tensor:
    bench = Bench(pipeline)
    frames = 5 if pipeline.card.makes_video else 1
    job = bench.add("a", width=64, height=64, num_frames=frames, num_inference_steps=steps, seed=1)
    job.blend = blend  # type: ignore[assignment]
    bench.run()
    assert not bench.errors, bench.errors
    return bench.latents["a"][0]


def size(model: torch.nn.Module) -> int:
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return buffers + sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_blocks_in_one_byte(family: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(family)
    whole = opened(path)
    want = latents(whole)
    for name, most in (("int8", 0.05), ("fp8", 0.15)):
        small = opened(path, name)
        model = transformer(small)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
        changed = {n for n, m in layers.items() if isinstance(m, QuantisedLinear)}
        stayed = layers.keys() - changed
        assert any("to_out" in n for n in changed) and any("qkv" in n for n in changed)
        assert all("modulation" not in n and "norm" not in n for n in changed)
        assert any("time_embedder" in n or "t_embedder" in n for n in stayed)
        before = dict(transformer(whole).named_parameters())
        saved = sum(3 * layers[n].weight.numel() - 4 * layers[n].out_features for n in changed)
        assert size(model) == sum(p.nbytes for p in before.values()) - saved
        assert small.card.dit_precision == name
        got = latents(small)
        lost = float((got - want).norm() / want.norm())
        assert 0 < lost < most, (name, lost)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_adapters_go_on_top(name: str, tiny_flux_a: Path) -> None:
    whole, small = opened(tiny_flux_a), opened(tiny_flux_a, name)
    results = []
    for pipeline in (whole, small):
        layer = transformer(pipeline).get_submodule("single_blocks.0.to_out")
        assert isinstance(layer, Linear)
        generator = torch.Generator().manual_seed(1)
        down = torch.randn(4, layer.in_features, generator=generator) / layer.in_features**0.5
        up = torch.randn(layer.out_features, 4, generator=generator)
        delta = LowRank(down, up, 1.0)
        place = Place(layer, "transformer.x", delta, 0)
        assert place.can_be_applied
        adapter = Adapter("PEFT", "x", {"transformer": {"x": (delta,)}}, alpha=4.0)
        fitted = Fitted(Source("x", "x"), adapter, {"transformer": (place,)}, (), 0)
        blend = make_blend([(fitted, 1.0, ("transformer",))])
        results.append((latents(pipeline), latents(pipeline, blend)))
    (base, with_it), (small_base, small_with_it) = results
    change, small_change = with_it - base, small_with_it - small_base
    assert float(change.norm()) > 0.02 * float(base.norm())
    assert float((small_change - change).norm() / change.norm()) < 0.3


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_nothing_is_merged_into_one_byte(name: str, tiny_flux_a: Path) -> None:
    pipeline = opened(tiny_flux_a, name)
    assert isinstance(pipeline, AdaptablePipeline)
    components = pipeline.adaptables()
    assert pick_mode("auto", [], components) == "dynamic"
    with pytest.raises(RequestError, match="weights of transformer are torch"):
        pick_mode("merge", [], components)


def test_what_does_not_go_together_is_refused(tiny_flux_a: Path) -> None:
    with pytest.raises(ConfigError, match="--dit-layerwise-offload exclude each other"):
        opened(tiny_flux_a, "int8", dit_layerwise_offload=True)
    with pytest.raises(ConfigError, match="--quantization: the model runs through diffusers"):
        opened(tiny_flux_a, "fp8", backend="diffusers")


def test_it_is_counted_and_other_components_may_be_away(tiny_flux_a: Path) -> None:
    pipeline = opened(tiny_flux_a, "int8", text_encoder_cpu_offload=True)
    assert {part.component for part in pipeline.card.offload} == {"text_encoder", "text_encoder_2"}
    assert measure(pipeline).step_cell > 0
