"""Models that do not fit are refused before they are loaded, with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgl_diffusion.base import memory
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import OutOfMemoryError, SetupError
from sgl_diffusion.loader.index import read_index
from sgl_diffusion.recipes import fit
from sgl_diffusion.recipes.registry import open_pipeline
from tests.recipes.test_loading import FAMILIES, parameters

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_what_the_loaded_weights_take(
    family: str, precision: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(family)
    options = EngineOptions(
        model_path=str(path),
        dit_precision=precision,
        vae_precision=precision,
        text_encoder_precision=precision,
    )
    loaded = parameters(open_pipeline(options, lambda note: None))
    taken = {value.data_ptr(): value.nbytes for value in loaded.values()}
    estimate = sum(fit.weight_bytes(read_index(path), options).values())
    # Beside the weights: few buffers, and in bf16 the parameters of a family that stay fp32.
    assert 0.85 <= estimate / sum(taken.values()) <= 1.15


@pytest.mark.parametrize("backend", ["native", "diffusers"])
def test_what_does_not_fit_is_refused_with_numbers(
    backend: str, tiny_flux_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 100_000)
    options = EngineOptions(model_path=str(tiny_flux_a), backend=backend)
    with pytest.raises(
        OutOfMemoryError, match=r"FluxPipeline take 0\.0 GB \(transformer"
    ) as caught:
        open_pipeline(options, lambda note: None)
    assert "cpu has 0.0 GB for it" in caught.value.message
    assert "--dit-precision bf16" in caught.value.hint
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert open_pipeline(options, lambda note: None)


def test_large_weights_are_named_from_their_headers(
    tiny_flux_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "weight_count", lambda part: 6_000_000_000)
    monkeypatch.setattr(memory, "free_memory", lambda device: 30 * 10**9)
    options = EngineOptions(model_path=str(tiny_flux_a), dit_precision="bf16")
    with pytest.raises(
        OutOfMemoryError, match=r"84\.0 GB .*transformer 12\.0.* 28\.5 GB"
    ) as caught:
        fit.check_fits(read_index(tiny_flux_a), options)
    assert caught.value.hint.startswith("Not even --text-encoder-precision bf16 (-24.0 GB) and ")


def test_the_advice_is_as_much_as_it_takes(
    tiny_flux_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "weight_count", lambda part: 6_000_000_000)
    monkeypatch.setattr(memory, "free_memory", lambda device: 80 * 10**9)
    with pytest.raises(OutOfMemoryError) as caught:
        fit.check_fits(read_index(tiny_flux_a), EngineOptions())
    advice = "--text-encoder-precision bf16 (-24.0 GB)"
    assert caught.value.hint == f"Try {advice}."
    options = EngineOptions(text_encoder_precision="bf16", memory_budget="60g")
    with pytest.raises(OutOfMemoryError, match="--memory-budget 60g leaves 64.4 GB") as caught:
        fit.check_fits(read_index(tiny_flux_a), options)
    assert caught.value.hint == "Try --dit-precision bf16 (-12.0 GB)."


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 64 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "nowhere")
    assert memory.free_memory(CPU) == 64 * 1024
    group = tmp_path / "group"
    group.mkdir()
    for name, text in {"max": "9000", "current": "5000", "stat": "anon 4000\nfile 1000\n"}.items():
        (group / f"memory.{name}").write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", group)
    assert memory.free_memory(CPU) == 5000
    (group / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) == 64 * 1024
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "nowhere")
    assert memory.free_memory(CPU) is None


def test_missing_weights_are_said_before_anything_is_loaded(tiny_flux_a: Path) -> None:
    index = read_index(tiny_flux_a).with_weights("transformer", tiny_flux_a / "model_index.json")
    with pytest.raises(SetupError, match="damaged"):
        fit.check_fits(index, EngineOptions())
