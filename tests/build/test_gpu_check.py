"""The parts of the GPU check that go through the engine, on the CPU with small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_denoise, gpu_engine
from benchmarks.denoise_cases import CASES, CPU_CASES, NAMED, SMALL, Case, Step, relative
from benchmarks.gpu_check import PARTS
from sgl_diffusion import ops

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_step_of_the_engine_is_that_of_diffusers(case: Case) -> None:
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
    from sgl_diffusion.models.z_image import ZImageParams

    known = {"wan": WanParams, "flux": FluxParams, "z_image": ZImageParams}
    widths = {"Wan 1.3B": 1536, "Wan 14B": 5120, "FLUX": 3072, "Z-Image": 3840}
    for case in CASES + CPU_CASES:
        params = known[case.family].from_config(case.config)
        width = params.dim if isinstance(params, ZImageParams) else params.width
        assert [width] == [w for name, w in widths.items() if case.name.startswith(name)]
    assert [case.tokens for case in CPU_CASES] == [1560, 4096, 1024, 1024]
    assert CASES[0].tokens == 32760


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

    def rows(case: Case, clock: object) -> list[bench_denoise.Row]:
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(case.name)
        return [{"shape": case.name}]

    monkeypatch.setattr(bench_denoise, "case_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        bench_denoise.denoise(SMALL, "cpu", state)
    assert list(json.loads(state.read_text())) == [SMALL[0].name]
    monkeypatch.setattr(bench_denoise, "case_rows", lambda case, clock: [{"shape": case.name}])
    assert [row["shape"] for row in bench_denoise.denoise(SMALL, "cpu", state)] == [
        case.name for case in SMALL
    ]
    assert not state.exists(), "a run that is complete begins anew"


@pytest.mark.slow
def test_the_e2e_part_runs() -> None:
    """On a CPU there are no graphs; all else is the same: the adapter, the server, diffusers."""
    rows = gpu_engine.e2e("cpu")
    assert len(rows) == 4 * len(gpu_engine.MODELS)
    assert [row["result"] for row in rows[::4]] == ["ready"] * len(gpu_engine.MODELS)
    for picture in (row for row in rows if "psnr" in row):
        assert picture["result"] == "passed", picture
        assert picture["same seed, same picture"] and picture["graph replays"] == 0
