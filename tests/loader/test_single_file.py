"""Transformers from single files under their authors' names, against diffusers' converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, ModelNotFoundError, SetupError
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.loader.weights import load_weights
from sgl_diffusion.models import (
    flux,
    flux2,
    flux2_weights,
    flux_weights,
    qwen_image,
    qwen_image_weights,
    sd3,
    sd3_weights,
    wan,
    wan_weights,
    z_image,
    z_image_omni,
    z_image_weights,
)
from sgl_diffusion.recipes.registry import open_pipeline
from tests.checkpoints.tiny_wan import Build
from tests.engine.bench import Bench
from tests.loader.single_files import WRITERS, converter

WIDTH = 64  # of the tiny FLUX.1
FAMILIES: dict[str, tuple[Any, Any, Any, str]] = {
    "flux": (flux.FluxTransformer, flux.FluxParams, flux_weights.RULES, "tiny_flux_a"),
    "flux2": (flux2.Flux2Transformer, flux2.Flux2Params, flux2_weights.RULES, "tiny_flux2_dev"),
    "sd3": (sd3.Sd3Transformer, sd3.Sd3Params, sd3_weights.RULES, "tiny_sd3_a"),
    "sd3_plain": (sd3.Sd3Transformer, sd3.Sd3Params, sd3_weights.RULES, "tiny_sd3_b"),
    "wan": (wan.WanTransformer, wan.WanParams, wan_weights.RULES, "tiny_wan_a"),
    "wan_i2v": (wan.WanTransformer, wan.WanParams, wan_weights.RULES, "i2v"),
    "z_image": (
        z_image.ZImageTransformer,
        z_image.ZImageParams,
        z_image_weights.RULES,
        "tiny_z_image_a",
    ),
    "z_image_omni": (
        z_image_omni.ZImageOmniTransformer,
        z_image.ZImageParams,
        z_image_weights.RULES,
        "tiny_z_image_omni_a",
    ),
    "qwen_image": (
        qwen_image.QwenImageTransformer,
        qwen_image.QwenImageParams,
        qwen_image_weights.RULES,
        "tiny_qwen_image_a",
    ),
}


def checkpoint(family: str, request: pytest.FixtureRequest) -> Path:
    name = FAMILIES[family][3]
    if name.startswith("tiny_"):
        return Path(request.getfixturevalue(name))
    build: Build = request.getfixturevalue("tiny_wan_kind")
    return build(name)


def stored(path: Path, name: str = "transformer") -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in (path / name).glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def loaded(family: str, path: Path, source: Path) -> nn.Module:
    kind, params, rules, _ = FAMILIES[family]
    with torch.device("meta"):
        model: nn.Module = kind(params.from_config(read_config(path / "transformer")))
    load_weights(model, source, rules, dtype=torch.float32)
    return model


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_those_that_diffusers_reads(
    family: str, prefix: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = checkpoint(family, request)
    names = family.removesuffix("_i2v").removesuffix("_plain").removesuffix("_omni")
    weights = stored(path)
    original = {key: value.contiguous() for key, value in WRITERS[names](weights).items()}
    theirs = converter(names, WIDTH)(dict(original))
    assert theirs.keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in theirs.items())

    beside = {"vae.decoder.conv_in.weight": torch.zeros(2)} if prefix else {}
    named = {prefix + key: value for key, value in original.items()}
    save_file({**named, **beside}, tmp_path / "model.safetensors")
    ours = loaded(family, path, tmp_path / "model.safetensors").state_dict()
    expected = loaded(family, path, path / "transformer").state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in expected.items())


def test_misfits_carry_the_names_of_the_file(tiny_flux_a: Path, tmp_path: Path) -> None:
    original = WRITERS["flux"](stored(tiny_flux_a))
    del original["double_blocks.1.img_attn.qkv.weight"]
    original["stray.weight"] = torch.zeros(2)
    save_file({k: v.contiguous() for k, v in original.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SetupError) as caught:
        loaded("flux", tiny_flux_a, tmp_path / "model.safetensors")
    assert "unexpected: stray.weight" in caught.value.message
    assert "missing: double_blocks.1.img_attn.qkv.weight." in caught.value.message


def latents(options: EngineOptions) -> Tensor:
    pipeline = open_pipeline(options, lambda note: None)
    assert isinstance(pipeline, Pipeline)
    bench = Bench(pipeline)
    bench.add("job", num_frames=1, num_inference_steps=2, width=32, height=32)
    bench.run()
    assert not bench.errors
    return bench.latents["job"][0]


def test_a_file_replaces_the_transformer_of_a_repository(tiny_flux_a: Path, tmp_path: Path) -> None:
    """As `--transformer-path flux1-dev.safetensors` does; half as large weights show that it is
    this file that is served."""
    original = {k: v.contiguous() for k, v in WRITERS["flux"](stored(tiny_flux_a)).items()}
    save_file(original, tmp_path / "same.safetensors")
    original["final_layer.linear.weight"] = original["final_layer.linear.weight"] / 2
    save_file(original, tmp_path / "other.safetensors")
    plain = latents(EngineOptions(model_path=str(tiny_flux_a)))
    for name, equal in (("same", True), ("other", False)):
        file = str(tmp_path / f"{name}.safetensors")
        options = EngineOptions(model_path=str(tiny_flux_a), transformer_path=file)
        assert torch.equal(latents(options), plain) is equal


def test_each_expert_takes_a_file_of_its_own(tiny_wan_kind: Build, tmp_path: Path) -> None:
    path = tiny_wan_kind("t2v-experts")
    plain = latents(EngineOptions(model_path=str(path)))
    files = {}
    for name in ("transformer", "transformer_2"):
        files[f"{name}_path"] = str(tmp_path / f"{name}.safetensors")
        save_file(WRITERS["wan"](stored(path, name)), files[f"{name}_path"])
    assert torch.equal(latents(EngineOptions(model_path=str(path), **files)), plain)  # type: ignore[arg-type]
    swapped = EngineOptions(
        model_path=str(path),
        transformer_path=files["transformer_2_path"],
        transformer_2_path=files["transformer_path"],
    )
    assert not torch.equal(latents(swapped), plain)


def test_what_cannot_be_a_transformer(tiny_flux_a: Path, tmp_path: Path) -> None:
    def opening(**more: Any) -> None:
        open_pipeline(EngineOptions(model_path=str(tiny_flux_a), **more), lambda note: None)

    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        opening(transformer_path=str(tmp_path / "nowhere.safetensors"))
    (tmp_path / "model.ckpt").write_bytes(b"0")
    with pytest.raises(SetupError, match="pickle"):
        opening(transformer_path=str(tmp_path / "model.ckpt"))
    with pytest.raises(SetupError, match="has no transformer_2"):
        opening(transformer_2_path=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"0")
    with pytest.raises(SetupError, match="damaged"):
        opening(transformer_path=str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match="transformer_path cannot be chosen"):
        opening(transformer_path=str(tmp_path / "model.safetensors"), backend="diffusers")
