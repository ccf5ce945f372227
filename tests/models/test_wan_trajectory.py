"""The whole way from a prompt to pixels with our parts, in a plain loop, against WanPipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.components.samplers import SolverState, advance, make_solver
from sgl_diffusion.components.text_umt5 import TextUmt5
from sgl_diffusion.components.vae_wan import VaeWan
from sgl_diffusion.loader.index import read_config, read_index
from sgl_diffusion.models.wan import TextContext, WanTransformer
from tests.fixtures_wan import load_transformer
from tests.oracles import wan as oracle

CPU = torch.device("cpu")
PROMPT, NEGATIVE = "a small red fox running in the snow", "blurry, low quality"
HEIGHT, WIDTH, STEPS, SEED = 48, 80, 6, 11


@dataclass(frozen=True)
class Parts:
    text: TextUmt5
    transformer: WanTransformer
    vae: VaeWan
    scheduler: dict[str, Any]
    theirs: Any


@pytest.fixture(scope="module", params=["tiny_wan_a", "tiny_wan_b"])
def parts(request: pytest.FixtureRequest) -> Parts:
    path: Path = request.getfixturevalue(request.param)
    index = read_index(path)
    return Parts(
        TextUmt5.load(index, dtype=torch.float32, device=CPU),
        load_transformer(path),
        VaeWan.load(index, dtype=torch.float32, device=CPU),
        read_config(index.component("scheduler").folder, "scheduler_config.json"),
        oracle.pipeline(path),
    )


@torch.inference_mode()
def our_latents(parts: Parts, frames: int, guidance: float) -> Tensor:
    prompts = [PROMPT, NEGATIVE] if guidance > 1 else [PROMPT]
    context: TextContext = parts.transformer.prepare(parts.text.encode(prompts))
    noise = torch.randn(
        1, 16, (frames + 3) // 4, HEIGHT // 8, WIDTH // 8,
        generator=torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    solver = make_solver(parts.scheduler, STEPS)
    state = SolverState.start(noise)
    for timestep, row in zip(solver.timesteps, solver.table, strict=True):
        copies = len(prompts)
        velocity = parts.transformer(
            state.x.expand(copies, -1, -1, -1, -1), timestep.expand(copies), context
        )
        if copies == 2:
            conditional, unconditional = velocity.split(1)
            velocity = unconditional + guidance * (conditional - unconditional)
        state = advance(state, velocity, row[None])
    return state.x


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize("frames", [1, 17])
def test_latents_and_pixels_equal_the_pipeline(parts: Parts, frames: int, guidance: float) -> None:
    call = {
        "negative_prompt": NEGATIVE,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": frames,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
    }
    expected, wanted = oracle.run(parts.theirs, PROMPT, seed=SEED, **call)
    got = our_latents(parts, frames, guidance)
    assert 0.5 < float(expected.std()) < 4
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

    pixels = torch.cat(list(parts.vae.decode_chunks(got[0])))
    assert pixels.shape == wanted.shape == (frames, HEIGHT, WIDTH, 3)
    assert int((pixels.int() - wanted.int()).abs().max()) <= 1


def test_the_prompt_and_its_negative_show_in_the_latents(parts: Parts) -> None:
    """Otherwise the comparison above would not notice a lost text."""
    call = {"height": HEIGHT, "width": WIDTH, "num_frames": 1, "num_inference_steps": STEPS}
    base = oracle.latents(parts.theirs, PROMPT, seed=SEED, **call)
    for change in ({"prompt": "a boat"}, {"negative_prompt": NEGATIVE}):
        given = {"prompt": PROMPT, **change}
        other = oracle.latents(parts.theirs, given.pop("prompt"), seed=SEED, **call, **given)
        assert float((base - other).abs().max()) > 0.1
