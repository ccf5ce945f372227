"""Offload as options of a served model: what they do, what they refuse, what a budget decides."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, OutOfMemoryError, RequestError
from sgl_diffusion.engine.lora.checks import pick_mode
from sgl_diffusion.engine.offload.take_up import OPTIONS
from sgl_diffusion.engine.pipeline import AdaptablePipeline, Counted, Pipeline
from sgl_diffusion.loader.absent import is_absent
from sgl_diffusion.recipes import open_native
from sgl_diffusion.recipes.registry import open_pipeline

NAMES = sorted(set(OPTIONS.values()))


def opened(path: Path, notes: list[str] | None = None, **options: object) -> Pipeline:
    chosen = EngineOptions(model_path=str(path), **options)  # type: ignore[arg-type]
    pipeline = open_pipeline(chosen, [].append if notes is None else notes.append)
    assert isinstance(pipeline, Pipeline)
    return pipeline


@pytest.mark.parametrize("name", NAMES)
def test_an_option_keeps_its_components_away(name: str, tiny_flux_a: Path) -> None:
    notes: list[str] = []
    pipeline = opened(tiny_flux_a, notes, **{name: True})
    found = [part.component for part in pipeline.card.offload]
    expected = {
        "dit_layerwise_offload": ["transformer"],
        "text_encoder_cpu_offload": ["text_encoder", "text_encoder_2"],
        "vae_cpu_offload": ["vae"],
    }[name]
    assert sorted(found) == expected
    assert all(
        part.away > part.resident for part in pipeline.card.offload if part.component != "vae"
    )
    assert all(any(note.startswith(f"{component}: ") for note in notes) for component in expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_through_diffusers_is_not_taken_apart(name: str, tiny_flux_a: Path) -> None:
    with pytest.raises(ConfigError, match="runs through diffusers") as caught:
        opened(tiny_flux_a, backend="diffusers", **{name: True})
    assert caught.value.param == name


def test_adapters_are_not_merged_into_what_is_away(tiny_flux_a: Path) -> None:
    pipeline = opened(tiny_flux_a, dit_layerwise_offload=True)
    assert isinstance(pipeline, AdaptablePipeline)
    components = pipeline.adaptables()
    assert is_absent(components["transformer"].module)
    assert pick_mode("auto", [], components) == "dynamic"
    with pytest.raises(RequestError, match="weights of transformer are away") as caught:
        pick_mode("merge", [], components)
    assert "merge_mode dynamic" in caught.value.hint


def test_a_budget_decides(tiny_flux_a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"transformer": 4 * 10**9, "text_encoder_2": 10**10, "vae": 10**8}
    described = open_native.described

    def larger(absent: object) -> object:
        found = described(absent)  # type: ignore[arg-type]
        away = sizes.get(found.component, 0)
        return dataclasses.replace(found, away=away, resident=0, buffers=away // 20)

    monkeypatch.setattr(open_native, "described", larger)
    monkeypatch.setattr(open_native, "free_for_one", lambda options, device: 15 * 10**9)
    notes: list[str] = []
    pipeline = opened(tiny_flux_a, notes, memory_budget="15g")
    assert pipeline.card.offload == ()
    assert pipeline.card.footprint is None, "how much room there is, is not known yet"
    assert isinstance(pipeline, Counted)
    counted = pipeline.counted
    monkeypatch.setattr(open_native, "counted_once", lambda pipeline, options, note: counted)
    monkeypatch.setattr(open_native, "free_for_one", lambda options, device: 9 * 10**9)
    pipeline = opened(tiny_flux_a, notes, memory_budget="9g")
    away = {part.component for part in pipeline.card.offload}
    assert away == {"text_encoder", "text_encoder_2"}
    assert any("--text-encoder-cpu-offload: the whole model exceeds" in note for note in notes)
    monkeypatch.setattr(open_native, "free_for_one", lambda options, device: 7 * 10**8)
    with pytest.raises(OutOfMemoryError, match=r"14\.10 GB, with .* 0\.7\d GB, .*leaves 0\.70 GB"):
        opened(tiny_flux_a, memory_budget="700m")


def test_what_cannot_fit_is_told_in_numbers(tiny_wan_a: Path) -> None:
    """Such a small model has nothing to offload that is larger than the buffers for it."""
    with pytest.raises(OutOfMemoryError) as caught:
        opened(tiny_wan_a, memory_budget="1m")
    told = r"WanPipeline does not fit: its weights take 0\.\d\d GB, (with --\S.* GB, )?the smallest"
    assert re.match(told, caught.value.message), caught.value.message
    assert "--memory-budget 1m leaves 0.00 GB" in caught.value.message
