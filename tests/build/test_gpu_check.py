"""The parts of the GPU check that go through the engine, on the CPU with small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_engine
from benchmarks.denoise_cases import CASES, NAMED, SMALL, Step, relative
from benchmarks.gpu_check import PARTS
from sgl_diffusion import ops

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_step_of_the_engine_is_that_of_diffusers(case: gpu_engine.Case) -> None:
    step = Step(case, torch.device("cpu"), torch.float32)
    step.attend("auto")
    ops.reset_counts()
    got, want = step.ours(), step.theirs()
    assert got.shape == want.shape == step.noise.shape
    assert relative(got, want) < 1e-5 < 0.02 < relative(want, step.noise)
    assert ("cfg_combine_step", "torch") in ops.counts() or (
        "cfg_combine_step",
        "cpu",
    ) in ops.counts()


def test_the_cases_are_the_blocks_of_the_models() -> None:
    from sgl_diffusion.models.flux import FluxParams
    from sgl_diffusion.models.wan import WanParams

    for case in CASES:
        params = {"wan": WanParams, "flux": FluxParams}[case.family].from_config(case.config)
        assert case.latents[0] == params.latent_channels if case.family == "flux" else 16
    assert WanParams.from_config(CASES[1].config).width == 5120
    assert FluxParams.from_config(CASES[2].config).width == 3072


def test_the_named_kernels_exist() -> None:
    for op, name in NAMED.items():
        assert "cuda" in ops.OPS.get(op).implementation(name).devices


def test_the_makefile_names_every_part() -> None:
    text = (ROOT / "Makefile").read_text()
    assert f"make gpu-check PART={'|'.join(PARTS)}" in text
    assert f"PART={'|'.join(PARTS)}" in (ROOT / "docs" / "kernels.md").read_text()


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state" / "denoise.json"
    made: list[str] = []

    def rows(case: gpu_engine.Case, device: torch.device) -> list[gpu_engine.Row]:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(case.name)
        return [{"shape": case.name}]

    monkeypatch.setattr(gpu_engine, "denoise_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        gpu_engine.denoise(SMALL, "cpu", state)
    assert list(json.loads(state.read_text())) == [SMALL[0].name]
    monkeypatch.setattr(gpu_engine, "denoise_rows", lambda case, device: [{"shape": case.name}])
    assert [row["shape"] for row in gpu_engine.denoise(SMALL, "cpu", state)] == [
        case.name for case in SMALL
    ]
    assert not state.exists(), "a run that is complete begins anew"


@pytest.mark.slow
def test_the_denoise_part_runs() -> None:
    rows = gpu_engine.denoise(SMALL, "cpu", None)
    assert {row["by"] for row in rows} == {"diffusers", "ours automatic"}
    assert all(row["ms"] > 0 and row["apart"] < 1e-5 for row in rows)


@pytest.mark.slow
def test_the_e2e_part_runs() -> None:
    serve, picture = gpu_engine.e2e("cpu")
    assert serve["result"] == "ready" and picture["result"] == "passed", picture
    assert picture["same seed, same picture"]
