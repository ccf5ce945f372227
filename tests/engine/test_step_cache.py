"""Steps that reuse an earlier one: what is left out, what comes of it, and whose memory it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sgl_diffusion.attention import BACKENDS, AttentionContext
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import SamplingParams
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.parallel.families import FAMILIES
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.step_cache import StepCache
from tests.engine.bench import Bench
from tests.engine.parallel.test_families import CASES
from tests.recipes.parity import opened

WISH = {"num_inference_steps": 8, "seed": 3}


@pytest.fixture(scope="module")
def pipeline(tiny_wan_a: Path) -> Pipeline:
    return opened(tiny_wan_a)


def asking_row(threshold: float) -> Any:
    params = SimpleNamespace(teacache_threshold=threshold)
    return SimpleNamespace(job=SimpleNamespace(params=params), memory=None, reused=0)


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_reused_pass_is_the_pass_it_reuses(name: str) -> None:
    """The same input twice: the second time only the first block runs."""
    make, arguments = CASES[name]
    model, run = make(*arguments)
    model.attention = AttentionContext.on_one_rank(BACKENDS.get("native"), model.attention.repeated)
    whole = run()
    counters = Counters()
    part = SimpleNamespace(adaptables=lambda: {"transformer": SimpleNamespace(module=model)})
    cache = StepCache(part, counters)  # type: ignore[arg-type]
    calls = []
    for place, block in enumerate(FAMILIES[type(model)].trunk(model)):
        inner = next(
            m for m in block.modules() if isinstance(getattr(m, "weight", None), torch.Tensor)
        )
        inner.register_forward_pre_hook(lambda *_, place=place: calls.append(place))
    row = asking_row(0.01)
    with cache.of(row):
        assert torch.equal(run(), whole)
        computed = set(calls)
        calls.clear()
        again = run()
    assert (again - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert set(calls) <= {0} and len(computed) > 1
    counts = {m.labels["result"]: m.value for m in counters.metrics()}
    assert counts == {"computed": 1, "reused": 1}
    assert torch.equal(run(), whole), "no row, no reuse"
    with cache.of(asking_row(0.01)):
        assert torch.equal(run(), whole), "another row begins anew"


def latents(pipeline: Pipeline, **wish: Any) -> tuple[torch.Tensor, Bench]:
    bench = Bench(pipeline)
    bench.add("one", **WISH, **wish)
    bench.run()
    assert not bench.errors
    return bench.latents["one"][0], bench


def test_nothing_is_reused_where_nothing_is_alike(pipeline: Pipeline) -> None:
    plain, bench = latents(pipeline)
    assert bench.count("step_cache_steps_total") == 0
    strict, bench = latents(pipeline, enable_teacache=True, teacache_threshold=0.001)
    assert torch.equal(plain, strict)
    assert bench.count("step_cache_steps_total", result="computed") == 8
    assert bench.count("step_cache_steps_total", result="reused") == 0


def test_more_is_reused_with_a_higher_threshold(pipeline: Pipeline) -> None:
    plain, _ = latents(pipeline)
    reused, apart = [], []
    for threshold in (0.05, 0.3, 1.0):
        found, bench = latents(pipeline, enable_teacache=True, teacache_threshold=threshold)
        reused.append(bench.count("step_cache_steps_total", result="reused"))
        apart.append(float((found - plain).abs().max()))
    assert reused == sorted(reused) and 0 < reused[-1] < 8, reused
    assert apart == sorted(apart) and 0 < apart[-1] < 10, apart


def test_each_row_remembers_its_own_and_no_longer_than_it_runs(pipeline: Pipeline) -> None:
    wish = {**WISH, "enable_teacache": True, "teacache_threshold": 1.0}
    alone, _ = latents(pipeline, enable_teacache=True, teacache_threshold=1.0)
    plain, _ = latents(pipeline)
    bench = Bench(pipeline)
    jobs = [bench.add("one", **wish), bench.add("two", num_outputs=2, **wish, prompt="waves")]
    bench.add("plain", **WISH)
    rows = [row for job in jobs for row in job.rows]
    remembered = 0
    while bench.runner.step():
        bench.look()
        remembered = max(remembered, sum(row.memory is not None for row in rows))
        assert all(row.memory is None for row in rows if row.denoised)
    assert remembered > 0 and not bench.errors
    assert torch.equal(bench.latents["one"][0], alone)
    assert (bench.latents["plain"][0] - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert bench.count("denoise_forwards_total", rows="1") == bench.count("denoise_forwards_total")


def test_it_is_off_unless_asked_for_and_refused_where_it_cannot_be(pipeline: Pipeline) -> None:
    card = pipeline.card

    def resolve(**wish: Any) -> float | None:
        return card.resolve(SamplingParams(prompt="x", **wish), video=False).teacache_threshold

    assert resolve() is None and resolve(enable_teacache=True) == 0.1
    with pytest.raises(RequestError, match="needs enable_teacache"):
        resolve(teacache_threshold=0.2)
    with pytest.raises(RequestError, match="must be from"):
        resolve(enable_teacache=True, teacache_threshold=0.0)
    card = dataclasses.replace(card, step_cache=False)
    with pytest.raises(RequestError, match="takes no enable_teacache"):
        resolve(enable_teacache=True)
