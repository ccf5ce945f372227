"""Adapters on pipelines that diffusers runs: the pictures are those of its own loader."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import SetupError, SglError
from sgl_diffusion.base.lora import LoraUse
from sgl_diffusion.engine.worker import DiffusionWorker
from sgl_diffusion.loader.adapters.families.unet import original_names
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.outbox import RecordingOutbox
from tests.recipes.test_fallback_families import CASES, Engine

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


def _factors(layer: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    out, width, *kernel = layer.weight.shape  # type: ignore[union-attr]
    down = torch.randn(2, width, *kernel, generator=generator)
    up = 0.3 * torch.randn(out, 2, *(1 for _ in kernel), generator=generator)
    return down / (down[0].numel() ** 0.5), up


def _write(
    pipe: Any, components: tuple[str, ...], path: Path, kinds: tuple[type[nn.Module], ...]
) -> Path:
    """In PEFT's names, on every layer of these kinds."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for component in components:
        for name, layer in getattr(pipe, component).named_modules():
            if isinstance(layer, kinds):
                down, up = _factors(layer, generator)
                tensors[f"{component}.{name}.lora_A.weight"] = down
                tensors[f"{component}.{name}.lora_B.weight"] = up
    save_file(tensors, path)
    return path


def _write_kohya(pipe: Any, path: Path) -> Path:
    """As kohya writes for SDXL: Stability's names, flat, with an alpha."""
    modules = {n: m for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for layer in original_names(list(modules)):
        for name, module in modules.items():
            source = _filled(layer.source, layer.modules[0], name)
            if source is None or not source.startswith(("input", "middle", "output")):
                continue
            flat = "lora_unet_" + source.replace(".", "_")
            down, up = _factors(module, generator)
            tensors[f"{flat}.lora_down.weight"] = down
            tensors[f"{flat}.lora_up.weight"] = up
            tensors[f"{flat}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)
    return path


def _filled(source: str, module: str, name: str) -> str | None:
    """The source of one module, from a template with numbers for letters."""
    parts, found = module.split("."), name.split(".")
    if len(parts) != len(found):
        return None
    numbers = {}
    for part, value in zip(parts, found, strict=True):
        if part.startswith("{"):
            numbers[part] = value
        elif part != value:
            return None
    for part, value in numbers.items():
        source = source.replace(part, value)
    return source


@pytest.fixture(params=CASES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(request.getfixturevalue(request.param), CASES[request.param])


@pytest.fixture
def sdxl(tiny_sdxl: Path) -> Iterator[Engine]:
    yield Engine(tiny_sdxl, CASES["tiny_sdxl"])


def _network(engine: Engine) -> str:
    return "unet" if hasattr(engine.theirs, "unet") else "transformer"


def _use(engine: Engine, path: Path, name: str = "a") -> None:
    """Load an adapter on both sides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.theirs.load_lora_weights(str(path), adapter_name=name)
    setting = {"nickname": name, "path": str(path)}
    while not engine.worker.control("lora_prepare", {"settings": [setting]})["ready"]:
        pass
    engine.card = dataclasses.replace(engine.card, lora_targets=("transformer",))


def _set(engine: Engine, name: str, strength: float, mode: str = "auto") -> dict[str, Any]:
    settings = [{"nickname": name, "strength": strength}]
    return engine.worker.control("lora_set", {"settings": settings, "merge_mode": mode})


def _hashes(engine: Engine) -> dict[str, bytes]:
    pipeline = engine.worker._runner._pipeline  # type: ignore[union-attr]
    parts = pipeline.adaptables()  # type: ignore[union-attr]
    return {
        f"{part}.{name}": parameter.detach().numpy().tobytes()
        for part, each in parts.items()
        for name, parameter in each.module.named_parameters()
    }


def test_merged_and_per_request_are_the_pictures_of_diffusers(
    engine: Engine, tmp_path: Path
) -> None:
    base = engine.expected(5)
    before = _hashes(engine)
    path = _write(engine.theirs, (_network(engine),), tmp_path / "a.safetensors", (nn.Linear,))
    _use(engine, path)
    engine.theirs.set_adapters(["a"], [0.7])
    wanted = engine.expected(5)
    assert np.abs(wanted - base).mean() > 1, "the adapter shows"
    (own,) = engine.run("own", seed=5, loras=(LoraUse(nickname="a", strength=0.7),))
    assert np.abs(own - wanted).max() <= 1.01
    report = _set(engine, "a", 0.7)
    assert report["active"]["transformer"][0]["mode"] == "merged"
    (merged,) = engine.run("merged", seed=5)
    assert np.abs(merged - wanted).max() <= 1.01
    engine.worker.control("lora_unmerge", {"target": "all"})
    assert _hashes(engine) == before
    (again,) = engine.run("again", seed=5)
    assert np.abs(again - base).max() <= 1.01


@pytest.mark.slow
def test_convolutions_and_text_encoders_of_sdxl(sdxl: Engine, tmp_path: Path) -> None:
    parts = ("unet", "text_encoder", "text_encoder_2")
    kinds = (nn.Linear, nn.Conv2d)
    path = _write(sdxl.theirs, parts, tmp_path / "all.safetensors", kinds)
    _use(sdxl, path)
    (listed,) = sdxl.worker.control("lora_list", {})["loaded_adapters"]
    assert not listed["unmatched"] and not listed["per_request"]
    with pytest.raises(SglError, match="can only be merged"):
        sdxl.worker.control("lora_prepare", {"uses": [{"nickname": "a"}]})
    before = _hashes(sdxl)
    assert set(_set(sdxl, "a", 0.5)["active"]) == {"transformer", *parts[1:]}
    sdxl.theirs.set_adapters(["a"], [0.5])
    (merged,) = sdxl.run("merged", seed=5)
    assert np.abs(merged - sdxl.expected(5)).max() <= 1.01
    sdxl.worker.control("lora_unmerge", {"target": "all"})
    assert _hashes(sdxl) == before


def test_sdxl_under_the_names_that_kohya_writes(sdxl: Engine, tmp_path: Path) -> None:
    path = _write_kohya(sdxl.theirs, tmp_path / "kohya.safetensors")
    base = sdxl.expected(5)
    _use(sdxl, path)
    (listed,) = sdxl.worker.control("lora_list", {})["loaded_adapters"]
    assert listed["format"] == "kohya" and not listed["unmatched"] and listed["alpha"] == 1.5
    _set(sdxl, "a", 0.8)
    sdxl.theirs.set_adapters(["a"], [0.8])
    wanted = sdxl.expected(5)
    assert np.abs(wanted - base).mean() > 1, "the adapter shows"
    (merged,) = sdxl.run("merged", seed=5)
    assert np.abs(merged - wanted).max() <= 1.01


def test_a_server_begins_with_an_adapter_or_not_at_all(sdxl: Engine, tmp_path: Path) -> None:
    path = _write(sdxl.theirs, ("unet",), tmp_path / "a.safetensors", (nn.Linear,))
    other = tmp_path / "b.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.ones(1, 3)}, other)

    def load(adapter: Path) -> dict[str, Any]:
        folder = str(sdxl.theirs.config._name_or_path)
        options = EngineOptions(model_path=folder, lora_path=(str(adapter),))
        return dict(
            DiffusionWorker(
                lambda note: open_pipeline(options, note), options, RecordingOutbox()
            ).load()
        )

    assert load(path)["loras"]["active"]["transformer"][0]["merged"]
    with pytest.raises(SetupError):
        load(other)
