"""What stays away is not in the memory: resident pages of a fresh process, mapped ones included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import tiny_flux
from tests.own_process import found_by


def measured(small: Path, path: Path, **options: Any) -> dict[str, Any]:
    return found_by("tests.engine.offload.peak_of", str(small), str(path), json.dumps(options))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("single", "precision"), [(12, "fp32"), (24, "bf16")])
def test_a_transformer_in_the_checkpoint_takes_two_blocks(
    single: int, precision: str, tiny_flux_a: Path, tmp_path: Path
) -> None:
    """Some 200 or 400 MB of weights in fp32, and blocks of 16."""
    path = tiny_flux.build(
        tmp_path / "wide", heads=8, head_dim=64, axes=(16, 24, 24), single=single
    )
    size = sum(file.stat().st_size for file in (path / "transformer").glob("*.safetensors"))
    held = size if precision == "fp32" else size // 2
    whole = measured(tiny_flux_a, path, dit_precision=precision)
    away = measured(tiny_flux_a, path, dit_precision=precision, dit_layerwise_offload=True)
    assert away["offload"] == ["transformer"] and whole["offload"] == []
    assert away["latents"] == whole["latents"]
    assert whole["peak"] >= 0.9 * held
    assert whole["peak"] - away["peak"] >= 0.6 * held, (whole, away)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_budget_is_kept(tiny_flux_a: Path, tmp_path: Path) -> None:
    """Of a model with weights of some 450 MB."""
    path = tiny_flux.build(tmp_path / "wide", heads=8, head_dim=64, axes=(16, 24, 24), single=24)
    found = measured(tiny_flux_a, path, memory_budget="250m")
    assert "transformer" in found["offload"]
    assert found["peak"] <= 250 << 20
