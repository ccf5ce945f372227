"""One step of a group, with a stand-in for the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.components.samplers import SolverState
from sgl_diffusion.engine.denoise import denoise, shape_key
from sgl_diffusion.engine.graphs.arguments import rebuilt
from sgl_diffusion.engine.job import Job, Row
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.ops import library
from sgl_diffusion.recipes.registry import open_pipeline

needs_library = pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")


@pytest.fixture
def pipeline(tiny_wan_a: Path) -> Pipeline:
    opened = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


def begun(pipeline: Pipeline, **wish: Any) -> Row:
    small = {"prompt": "a cat", "width": 32, "height": 32, "num_frames": 5}
    params = pipeline.card.resolve(SamplingParams(**small, **wish), video=True)  # type: ignore[arg-type]
    job = Job("job", params)
    job.condition = pipeline.encode("a cat", params, ())
    job.negative = pipeline.encode("", params, ())
    job.solver = pipeline.solver(params)
    (row,) = job.rows
    row.state = SolverState.start(pipeline.noise(params, 1))
    return row


def test_guidance_is_done_in_fp32(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    row = begun(pipeline, guidance_scale=7.3, num_inference_steps=2)
    assert row.state is not None and row.job.solver is not None
    start = row.state.x
    with_prompt, without = torch.randn(2, *start.shape).bfloat16().split(1)
    velocity = torch.cat([with_prompt[0], without[0]])
    monkeypatch.setattr(pipeline, "velocity", lambda *_: velocity)
    denoise(pipeline, shape_key(pipeline, row), [row], None)
    guided = without[0].double() + 7.3 * (with_prompt[0].double() - without[0].double())
    expected = start.double() - float(row.job.solver.table[0, 0]) * guided
    assert (row.state.m0 - expected).abs().max() < 1e-4


def test_a_recipe_may_have_guidance_of_its_own(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def combine(with_prompt: Tensor, without: Tensor, scale: Tensor) -> Tensor:
        seen.append((with_prompt.dtype, without.dtype, scale.flatten().tolist()))
        return 2 * with_prompt + scale * without

    row = begun(pipeline, guidance_scale=7.0, num_inference_steps=2)
    assert row.state is not None and row.job.solver is not None
    start = row.state.x
    with_prompt, without = torch.randn(2, *start.shape).bfloat16()
    monkeypatch.setattr(pipeline, "velocity", lambda *_: torch.cat([with_prompt, without]))
    monkeypatch.setattr(pipeline, "combine", combine)
    denoise(pipeline, shape_key(pipeline, row), [row], None)
    assert seen == [(torch.float32, torch.float32, [7.0])]
    guided = 2 * with_prompt.double() + 7.0 * without.double()
    expected = start.double() - float(row.job.solver.table[0, 0]) * guided
    assert (row.state.m0 - expected).abs().max() < 1e-4


@needs_library
def test_the_engine_runs_the_native_kernels(tiny_wan_a: Path) -> None:
    """One guided step of a whole model: which implementation of each op ran, and how often."""
    # Named, because "auto" leaves calls as short as these to torch.
    options = EngineOptions(model_path=str(tiny_wan_a), attention_backend="native")
    pipeline = open_pipeline(options, lambda note: None)
    assert isinstance(pipeline, Pipeline)
    row = begun(pipeline, guidance_scale=5.0, num_inference_steps=2)
    context = pipeline.collate([row.job.condition, row.job.negative])
    ops.reset_counts()
    denoise(pipeline, shape_key(pipeline, row), [row], context)
    blocks = 2
    counts = ops.counts()
    # Linear layers are torch's or oneDNN's, whichever is faster on this CPU.
    assert {key: n for key, n in counts.items() if key[0] != "linear"} == {
        ("cfg_combine_step", "cpu"): 1,
        ("attention", "cpu"): 2 * blocks,
        ("gate_residual", "cpu"): blocks,
        ("gate_residual_norm_modulate", "cpu"): 2 * blocks,
        ("gelu_tanh", "cpu"): blocks,
        # before self-attention, the queries of cross-attention; after the last block
        ("norm_modulate", "cpu"): 2 * blocks + 1,
        ("qk_norm_rope", "cpu"): blocks,
    }


def test_a_step_mixes_no_tensors_of_the_host_with_those_of_the_device(pipeline: Pipeline) -> None:
    """On torch's meta device, which computes nothing but refuses tensors of another device."""
    device = torch.device("meta")
    row = begun(pipeline, guidance_scale=5.0, num_inference_steps=2)
    both = (row.job.condition, row.job.negative)
    conditions = [rebuilt(condition, lambda part: part.to(device)) for condition in both]
    pipeline.device = device
    (transformer,) = pipeline._experts.values()  # type: ignore[attr-defined]
    transformer.to(device)
    row.state = SolverState.start(pipeline.noise(row.job.params, 1))
    context = pipeline.collate(conditions)
    denoise(pipeline, shape_key(pipeline, row), [row], context)
    assert row.step == 1 and row.state is not None
    assert all(part.device == device for part in row.state)
