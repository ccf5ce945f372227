"""Jobs that are cancelled while their weights come and go: the others get what they get alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sgl_diffusion.engine import pulse
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.loader.absent import AbsentParameter
from tests.engine.bench import Bench
from tests.engine.offload.test_families import ALL, opened

SIZE = {"width": 64, "height": 64, "num_frames": 1, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipeline(tiny_flux_a: Path) -> Pipeline:
    return opened(tiny_flux_a, **ALL)


@pytest.fixture(autouse=True)
def at_every_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The worker looks up before every block, not once in a second."""
    monkeypatch.setattr(pulse, "EVERY_SECONDS", 0.0)
    yield


def run(pipeline: Pipeline, leaves_at: int | None, *, overlap: bool) -> tuple[Bench, int]:
    """Two jobs, of which one is cancelled at such a look; how many looks there were."""
    bench = Bench(pipeline, max_rows=1, overlap=overlap)
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == leaves_at:
            bench.runner.drop("leaves")

    bench.outbox.on_poll = look
    bench.add("leaves", **SIZE, seed=1, prompt="a small black car")
    bench.add("stays", **SIZE, seed=2)
    bench.run()
    bench.runner.settle()
    assert not bench.errors, bench.errors
    return bench, looks


def away(pipeline: Pipeline) -> int:
    """Parameters that are in no buffer."""
    modules = [module for block in pipeline.blocks() for module in block.modules()]
    found = [p for module in modules for p in module._parameters.values()]
    return sum(isinstance(parameter, AbsentParameter) for parameter in found)


@pytest.mark.parametrize("overlap", [False, True])
def test_at_any_block_of_any_unit(pipeline: Pipeline, overlap: bool) -> None:
    resting = away(pipeline)
    assert resting > 20
    whole, looks = run(pipeline, None, overlap=overlap)
    assert set(whole.outbox.outputs) == {"leaves", "stays"} and looks > 20
    want = whole.latents["stays"][0]
    cancelled = 0
    for share in (0.0, 0.15, 0.35, 0.55, 0.75, 0.95):
        bench, _ = run(pipeline, max(int(share * looks), 1), overlap=overlap)
        cancelled += "leaves" not in bench.outbox.outputs
        assert torch.equal(bench.latents["stays"][0], want), share
        assert torch.equal(bench.outbox.outputs["stays"][0], whole.outbox.outputs["stays"][0])
        assert away(pipeline) == resting, f"weights stayed after a cancel at {share}"
    assert cancelled >= 2
    again, _ = run(pipeline, None, overlap=overlap)
    assert torch.equal(again.latents["leaves"][0], whole.latents["leaves"][0])
