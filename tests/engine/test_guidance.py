"""Guidance that adds again what it added in an earlier step (`cfg_gate_step`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sgl_diffusion.engine.pipeline import Pipeline
from tests.engine.bench import Bench
from tests.recipes.parity import opened

WISH: dict[str, Any] = {"num_inference_steps": 8, "seed": 5}


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    return opened(tiny_wan_a)


def made(pipeline: Pipeline, **wish: Any) -> torch.Tensor:
    bench = Bench(pipeline)
    bench.add("job", **WISH, **wish)
    bench.run()
    assert not bench.errors, bench.errors
    return bench.latents["job"][0]


def counted(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of all passes from now on; guidance makes two of one."""
    velocity, rows = pipeline.velocity, []

    def run(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(latents))
        return velocity(latents, *rest)

    monkeypatch.setattr(pipeline, "velocity", run)
    return rows


def repeating(pipeline: Pipeline, whole: Callable[[int], bool]) -> Callable[..., torch.Tensor]:
    """Passes that compute both halves in every step, and in some say something else of the half
    without the prompt: that it is as far from the other as in the last one of the rest."""
    velocity, gaps, step = pipeline.velocity, [], -1

    def run(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal step
        step += 1
        with_prompt, without = velocity(latents, *rest).chunk(2)
        if whole(step):
            gaps.append(with_prompt - without)
        return torch.cat([with_prompt, with_prompt - gaps[-1]])

    return run


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 2e-5 * theirs.abs().max())


# The second has a guidance of its own, which looks at both halves.
@pytest.mark.parametrize("model", ["tiny_wan_a", "tiny_qwen_image_a"])
def test_the_gap_of_the_last_whole_step_is_taken_again(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened(request.getfixturevalue(model))
    more = {} if pipeline.card.makes_video else {"num_frames": 1, "true_cfg_scale": 4.0}
    always, never = made(pipeline, **more), made(pipeline, **more, guidance_stop=0.375)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "velocity", repeating(pipeline, lambda step: step < 3))
        expected = made(pipeline, **more)
    rows = counted(pipeline, monkeypatch)
    gated = made(pipeline, **more, cfg_gate_step=0.375)
    assert rows == [2, 2, 2, 1, 1, 1, 1, 1]
    assert near(gated, expected) and not near(gated, always) and not near(gated, never)


@pytest.mark.parametrize(
    ("wish", "rows"),
    [
        ({"cfg_gate_step": 0.0}, [2, 1, 1, 1, 1, 1, 1, 1]),
        ({"cfg_gate_step": 0.0, "guidance_start": 0.25}, [1, 1, 2, 1, 1, 1, 1, 1]),
        ({"cfg_gate_step": 0.25, "guidance_stop": 0.5}, [2, 2, 1, 1, 1, 1, 1, 1]),
        ({"cfg_gate_step": 0.75, "guidance_stop": 0.5}, [2, 2, 2, 2, 1, 1, 1, 1]),
        ({"cfg_gate_step": 0.0, "guidance_scale": 1.0}, [1] * 8),
    ],
)
def test_it_begins_with_a_step_that_computes_both(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, wish: dict[str, float], rows: list[int]
) -> None:
    found = counted(pipeline, monkeypatch)
    made(pipeline, **wish)
    assert found == rows


def test_rows_share_steps_and_remember_their_own(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = {
        "weak": {"cfg_gate_step": 0.25, "seed": 1, "guidance_scale": 3.0},
        "pair": {"cfg_gate_step": 0.25, "seed": 2, "num_outputs": 2, "prompt": "rain"},
        "whole": {"seed": 3},
        "plain": {"seed": 4, "guidance_scale": 1.0},
    }
    alone = {}
    for name, wish in wishes.items():
        bench = Bench(pipeline)
        bench.add(name, **{**WISH, **wish})
        bench.run()
        alone |= bench.latents
    rows = counted(pipeline, monkeypatch)
    bench = Bench(pipeline)
    jobs = [bench.add(name, **{**WISH, **wish}) for name, wish in wishes.items()]
    bench.run()
    assert not bench.errors
    for name, theirs in alone.items():
        for ours, other in zip(bench.latents[name], theirs, strict=True):
            assert near(ours, other), name
    assert 8 in rows and rows.count(3) == 6, "four with guidance, three that repeat it"
    assert all(row.gap is None for job in jobs for row in job.rows), "done rows keep nothing"


def test_pictures_of_different_sizes(pipeline: Pipeline) -> None:
    wishes: list[dict[str, Any]] = [
        {"width": 48, "height": 32, "seed": 1, "cfg_gate_step": 0.25},
        {"width": 64, "height": 48, "seed": 2, "cfg_gate_step": 0.25, "guidance_scale": 3.0},
    ]
    plain = [{**WISH, **wish, "num_frames": 1} for wish in wishes]
    bench = Bench(pipeline)
    for number, wish in enumerate(plain):
        bench.add(str(number), **wish)
    bench.run()
    assert not bench.errors and bench.count("packed_forwards_total", sizes="2") == 8
    for number, wish in enumerate(plain):
        alone = Bench(pipeline)
        alone.add("alone", **wish)
        alone.run()
        assert near(bench.latents[str(number)][0], alone.latents["alone"][0])


def test_each_expert_computes_it_once(
    tiny_wan_kind: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened(tiny_wan_kind("t2v-experts"))
    experts, velocity = [], pipeline.velocity

    def run(latents: torch.Tensor, times: torch.Tensor, context: Any, expert: int) -> torch.Tensor:
        experts.append((expert, len(latents)))
        return velocity(latents, times, context, expert)

    monkeypatch.setattr(pipeline, "velocity", run)
    made(pipeline, cfg_gate_step=0.0)
    for expert in (0, 1):
        rows = [count for number, count in experts if number == expert]
        assert rows == [2] + [1] * (len(rows) - 1) and len(rows) > 1


def test_what_a_job_keeps_is_counted(pipeline: Pipeline) -> None:
    from sgl_diffusion.engine.footprint.trials import measure

    footprint = measure(pipeline)
    bench = Bench(pipeline)
    plain, gated = bench.add("plain").params, bench.add("gated", cfg_gate_step=0.5).params
    more = footprint.kept(gated) - footprint.kept(plain)
    assert more == pytest.approx(4 * pipeline.noise(gated, 1).numel())
