"""Encoded prompts are made once, and again when anything that they depend on is another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.job import Job
from sgl_diffusion.engine.lora.rows import Blend
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.prompts import PromptCache, condition_bytes
from sgl_diffusion.recipes.registry import open_pipeline
from tests.engine.bench import Bench


@pytest.fixture(scope="module")
def opened(tiny_wan_a: Path) -> Pipeline:
    pipeline = open_pipeline(EngineOptions(model_path=str(tiny_wan_a)), lambda note: None)
    assert isinstance(pipeline, Pipeline)
    return pipeline


@pytest.fixture
def pipeline(opened: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """It writes down what it encodes."""
    encode = opened.encode

    def noted(prompt: str, *rest: object) -> object:
        opened.noted.append(prompt)  # type: ignore[attr-defined]
        return encode(prompt, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(opened, "noted", [], raising=False)
    monkeypatch.setattr(opened, "encode", noted)
    yield opened


def jobs_of(pipeline: Pipeline, *wishes: dict[str, object]) -> list[Job]:
    bench = Bench(pipeline)
    jobs = []
    for number, wish in enumerate(wishes):
        blend, epoch = wish.pop("blend", None), wish.pop("epoch", 0)
        job = bench.add(f"job {number}", **wish)
        job.blend, job.epoch = blend, epoch  # type: ignore[assignment]
        jobs.append(job)
    return jobs


def conditions(cache: PromptCache, pipeline: Pipeline, jobs: list[Job]) -> list[object]:
    return [
        cache.get(j, j.params.prompt, lambda j=j: pipeline.encode(j.params.prompt, j.params, []))  # type: ignore[misc]
        for j in jobs
    ]


def test_a_prompt_is_encoded_once_and_pictures_stay_the_same(pipeline: Pipeline) -> None:
    bench = Bench(pipeline, prompt_bytes=2**28)
    for number in range(3):
        bench.add(f"job {number}", prompt="a cat", negative_prompt="rain", seed=7)
    bench.run()
    assert pipeline.noted == ["a cat", "rain"]  # type: ignore[attr-defined]
    assert bench.count("cache_lookups_total", cache="prompt", result="miss") == 2
    assert bench.count("cache_lookups_total", cache="prompt", result="hit") == 4
    plain = Bench(pipeline)
    plain.add("job 0", prompt="a cat", negative_prompt="rain", seed=7)
    plain.run()
    for name in bench.latents:
        assert (bench.latents[name][0] - plain.latents["job 0"][0]).abs().max() <= 2e-5


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a dog"},
        {"max_sequence_length": 64},
        {"epoch": 1},
        {"blend": Blend((), {})},
    ],
    ids=["prompt", "length", "weights", "adapters"],
)
def test_whatever_a_condition_depends_on_is_in_its_key(
    pipeline: Pipeline, other: dict[str, object]
) -> None:
    cache = PromptCache(pipeline, 2**28, Counters())
    same, changed, again = conditions(cache, pipeline, jobs_of(pipeline, {}, dict(other), {}))
    assert same is again and same is not changed


def test_a_guidance_scale_counts_only_where_conditions_hold_it(pipeline: Pipeline) -> None:
    jobs = jobs_of(pipeline, {"guidance_scale": 3.0}, {"guidance_scale": 4.0})
    one, other = conditions(PromptCache(pipeline, 2**28, Counters()), pipeline, jobs)
    assert one is other
    pipeline.embeds_guidance = True  # type: ignore[attr-defined]
    try:
        one, other = conditions(PromptCache(pipeline, 2**28, Counters()), pipeline, jobs)
    finally:
        del pipeline.embeds_guidance  # type: ignore[attr-defined]
    assert one is not other


def test_the_oldest_go_when_the_budget_is_full(pipeline: Pipeline) -> None:
    wishes: list[dict[str, object]] = [{"prompt": word} for word in ("cat", "dog", "owl")]
    jobs = jobs_of(pipeline, *wishes)
    counters = Counters()
    size = condition_bytes(pipeline.encode("cat", jobs[0].params, []))
    cache = PromptCache(pipeline, 2 * size, counters)
    first, second, _ = conditions(cache, pipeline, jobs)
    assert conditions(cache, pipeline, jobs[1:2]) == [second]
    assert conditions(cache, pipeline, jobs[:1])[0] is not first
    (held,) = [m for m in counters.metrics() if m.name == "cache_bytes"]
    assert (held.value, held.kind) == (2 * size, "gauge")


def test_what_is_larger_than_the_budget_is_not_kept(pipeline: Pipeline) -> None:
    cache = PromptCache(pipeline, 10, Counters())
    (job,) = jobs_of(pipeline, {})
    (one,), (other,) = (conditions(cache, pipeline, [job]) for _ in range(2))
    assert one is not other


def test_shared_memory_counts_once() -> None:
    whole = torch.zeros(8, 4)
    assert condition_bytes((whole, [whole[:2], whole])) == 128
