"""The served Wan model, through the whole engine, against diffusers' WanPipeline."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.engine.pipeline import Pipeline, WholePipeline
from sgl_diffusion.ops import library
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench
from tests.oracles import wan as oracle

PROMPT = "a red cat walking on the beach, sunset &amp; waves"
NEGATIVE = "blurry, low quality"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module", params=["tiny_wan_a", "tiny_wan_b"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    # Named, because "auto" leaves calls as short as these to torch.
    backend = "auto" if library.absent() else "native"
    options = EngineOptions(model_path=str(folder), attention_backend=backend)
    opened = open_pipeline(options, lambda note: None)
    assert isinstance(opened, Pipeline)
    return opened


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return oracle.pipeline(folder)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("frames", [1, 17])
@pytest.mark.parametrize(("width", "height"), [(64, 32), (48, 48)])
def test_latents_and_frames_equal_diffusers(
    pipeline: Pipeline, theirs: Any, guidance: float, frames: int, width: int, height: int
) -> None:
    call = {
        "width": width,
        "height": height,
        "num_frames": frames,
        "num_inference_steps": 6,
        "guidance_scale": guidance,
        "negative_prompt": NEGATIVE,
    }
    bench = Bench(pipeline)
    bench.add("job", prompt=PROMPT, seed=11, **call)
    ops.reset_counts()
    bench.run()
    assert pipeline.card.attention_backend == "native" or library.absent()
    assert ("attention", "cpu") in ops.counts() or library.absent()
    latents, clip = oracle.run(theirs, PROMPT, seed=11, **call)
    assert 0.3 < latents.std() < 3, "the comparison means something for latents of order 1"
    assert (bench.latents["job"][0] - latents).abs().max() <= 1e-4
    ours = bench.outbox.outputs["job"][0].int()
    assert ours.shape == clip.shape == (frames, height, width, 3)
    assert (ours - clip.int()).abs().max() <= 1


def test_a_flow_shift_of_the_request_reaches_the_solver(pipeline: Pipeline) -> None:
    bench = Bench(pipeline)
    bench.add("own", seed=1)
    bench.add("shifted", seed=1, flow_shift=9.0)
    bench.run()
    own, shifted = (bench.latents[name][0] for name in ("own", "shifted"))
    assert (own - shifted).abs().max() > 1e-2


def test_the_card_tells_what_is_served(pipeline: Pipeline) -> None:
    card = pipeline.card
    assert (card.family, card.backend, card.pipeline_class) == ("wan", "native", "WanPipeline")
    assert (card.defaults.num_frames, card.defaults.fps, card.size_multiple) == (81, 16, 16)
    assert card.makes_video and card.dit_precision == "fp32"


def test_half_precision_is_close_to_full(folder: Path, pipeline: Pipeline) -> None:
    """bf16 end to end: compared by statistics, because a random net amplifies every rounding."""
    options = EngineOptions(model_path=str(folder), dit_precision="bf16")
    half = open_pipeline(options, lambda note: None)
    assert isinstance(half, Pipeline) and half.card.dit_precision == "bf16"
    clips = []
    for opened in (half, pipeline):
        bench = Bench(opened)
        bench.add("job", prompt=PROMPT, num_inference_steps=2)
        bench.run()
        clips.append(bench.latents["job"][0])
    assert torch.nn.functional.cosine_similarity(*(c.flatten() for c in clips), dim=0) > 0.98


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({SCHEDULER: {"_class_name": "DPMSolverMultistepScheduler"}}, "DPMSolverMultistep"),
        ({SCHEDULER: {"solver_order": 3}}, "solver_order=3"),
        ({"transformer/config.json": {"qk_norm": "layer_norm"}}, "qk_norm"),
    ],
)
def test_what_the_recipe_cannot_do_goes_to_diffusers_and_by_name_fails(
    tiny_wan_a: Path, tmp_path: Path, change: dict[str, dict[str, Any]], reason: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_wan_a, copy)
    for name, values in change.items():
        file = copy / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    options = EngineOptions(model_path=str(copy), backend="native")
    with pytest.raises(ConfigError, match=reason):
        open_pipeline(options, lambda note: None)
    if "DPM" in reason:
        opened = open_pipeline(dataclasses.replace(options, backend="auto"), lambda note: None)
        assert isinstance(opened, WholePipeline)
