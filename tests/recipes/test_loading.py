"""How every family loads: variants, and weights that do not fit the configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline
from sgl_diffusion.recipes.registry import open_pipeline

FAMILIES = [
    "tiny_flux_b",
    "tiny_flux2_dev",
    "tiny_qwen_image_a",
    "tiny_sd3_a",
    "tiny_wan_b",
    "tiny_z_image_a",
    "tiny_z_image_omni_b",
]


def opened(path: Path, **more: str) -> Pipeline | WholePipeline:
    return open_pipeline(EngineOptions(model_path=str(path), **more), lambda note: None)  # type: ignore[arg-type]


def parameters(pipeline: Pipeline | WholePipeline) -> dict[str, Tensor]:
    """Of every network that the pipeline holds."""
    found: dict[str, Tensor] = {}
    for name, part in vars(pipeline).items():
        several = list(part.values()) if isinstance(part, dict) else part
        several = several if isinstance(several, list | tuple) else [part]
        for number, one in enumerate(several):
            network = one if isinstance(one, nn.Module) else getattr(one, "_model", None)
            if isinstance(network, nn.Module):
                values = network.state_dict().items()
                found |= {f"{name}.{number}.{key}": value for key, value in values}
    return found


def weight_sets(path: Path) -> dict[str, list[Path]]:
    """The files of every component that has weights."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*/*.safetensors")):
        found.setdefault(file.parent.name, []).append(file)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_variant_is_loaded_where_a_component_has_it(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = shutil.copytree(request.getfixturevalue(family), tmp_path / "model")
    sets = weight_sets(path)
    kept = sorted(sets)[0]  # this one has plain weights only
    for name, (*_, file) in sets.items():
        if name != kept and len(sets[name]) == 1:
            found = load_file(file)
            halves = {k: v.half() if v.is_floating_point() else v for k, v in found.items()}
            kind = {"format": "pt"}
            save_file(halves, file.with_name(f"{file.stem}.fp16.safetensors"), metadata=kind)
    plain, variant = parameters(opened(path)), parameters(opened(path, variant="fp16"))
    assert len(plain) > 20 and plain.keys() == variant.keys()
    changed = [key for key, value in plain.items() if not torch.equal(value, variant[key])]
    assert len(changed) > 10
    # What is not the plain value is the half precision one: nothing else was mixed in.
    for key in changed:
        assert torch.equal(variant[key], plain[key].half().to(plain[key].dtype)), key


def in_shards(path: Path, dtype: torch.dtype) -> None:
    """The weights of every component anew: in two files, and in this precision."""
    for files in weight_sets(path).values():
        stored = {key: value for file in files for key, value in load_file(file).items()}
        weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in stored.items()}
        folder, stem = files[0].parent, files[0].name.split(".")[0].split("-00")[0]
        for old in [*files, *folder.glob("*.index.json")]:
            old.unlink()
        names = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        where = {key: names[number % 2] for number, key in enumerate(weights)}
        for name in names:
            part = {key: value for key, value in weights.items() if where[key] == name}
            save_file(part, folder / name, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_of_any_precision_hold_the_same_weights(
    family: str, dtype: torch.dtype, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(family)
    plain = parameters(opened(path))
    copy = Path(shutil.copytree(path, tmp_path / "model"))
    in_shards(copy, dtype)
    sharded = parameters(opened(copy))
    assert len(plain) > 20 and plain.keys() == sharded.keys()
    for key, value in plain.items():
        assert sharded[key].dtype == value.dtype
        rounded = value.to(dtype).to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(sharded[key], rounded), key


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_do_not_fit_are_named_whatever_the_component(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = shutil.copytree(request.getfixturevalue(family), tmp_path / "model")
    for name, files in weight_sets(path).items():
        file = files[-1]
        before = file.read_bytes()
        index = next(iter(file.parent.glob("*.index.json")), None)
        listed = None if index is None else index.read_bytes()
        weights = load_file(file)
        lost = sorted(key for key in weights if "layer" in key or "block" in key)[0]
        weights["stray.weight"] = torch.zeros(2)
        del weights[lost]
        save_file(weights, file, metadata={"format": "pt"})
        if index is not None:
            values = json.loads(index.read_text())
            del values["weight_map"][lost]
            values["weight_map"]["stray.weight"] = file.name
            index.write_text(json.dumps(values))
        with pytest.raises(SetupError) as caught:
            opened(path)
        message = caught.value.message
        assert caught.value.code == "bad_checkpoint" and f"/{name} do not fit" in message
        missing = message.partition("missing: ")[2].partition(";")[0].rstrip(".").split(", ")
        assert [key.split(".")[-1] for key in missing] == [lost.split(".")[-1]], (name, message)
        assert "unexpected: stray.weight" in message
        file.write_bytes(before)
        if index is not None and listed is not None:
            index.write_bytes(listed)
    assert parameters(opened(path))
