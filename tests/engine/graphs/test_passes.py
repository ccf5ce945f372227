"""What surrounds a graph: keys, inputs that stay in place, and when one is made.

A pass that is run again on the static inputs stands for the replay; tests/gpu has the real ones.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.footprint import Offloaded
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.graphs.arguments import rebuilt, signature, tensors
from sgl_diffusion.engine.graphs.capture import Pass, StaticInputs
from sgl_diffusion.engine.graphs.passes import BYPASSED, GraphedPasses, chosen_graphs
from sgl_diffusion.engine.lora.rows import make_blend
from sgl_diffusion.engine.pipeline import Pipeline
from tests.engine.bench import Bench


@dataclass(frozen=True)
class Given:
    text: Tensor
    lengths: tuple[int, ...]
    more: tuple[Tensor, ...] = ()
    nothing: Tensor | None = None


class Rerun:
    """The same pass on the inputs that stay where they are."""

    def __init__(
        self, run: Pass, latents: Tensor, timesteps: Tensor, context: Any, expert: int
    ) -> None:
        self._run, self._expert = run, expert
        self._inputs = StaticInputs(latents, timesteps, context)
        self.size = self._inputs.size

    def replay(self, latents: Tensor, timesteps: Tensor, context: Any) -> Tensor:
        self._inputs.write(latents, timesteps, context)
        held = self._inputs
        return self._run(held.latents, held.timesteps, held.context, self._expert)


def test_a_signature_tells_what_a_graph_depends_on() -> None:
    given = Given(torch.zeros(2, 3), (3, 1), (torch.ones(1),))
    assert signature(given) == signature(replace(given, text=torch.ones(2, 3)))
    for other in (
        replace(given, lengths=(3, 2)),
        replace(given, text=torch.zeros(2, 4)),
        replace(given, text=torch.zeros(2, 3, dtype=torch.bfloat16)),
        replace(given, more=()),
        replace(given, nothing=torch.zeros(1)),
    ):
        assert signature(other) != signature(given)
    assert len({signature(given)}) == 1
    assert [x.shape for x in tensors(given)] == [(2, 3), (1,)]
    doubled = rebuilt(given, lambda x: 2 * x)
    assert doubled.lengths == (3, 1) and torch.equal(doubled.more[0], torch.full((1,), 2.0))


def test_static_inputs_take_what_is_new() -> None:
    x, t, context = torch.zeros(1, 4), torch.zeros(1), Given(torch.zeros(2), (1,))
    inputs = StaticInputs(x, t, context)
    held = inputs.context.text
    other = Given(torch.ones(2), (1,))
    inputs.write(x + 1, t + 2, other)
    assert inputs.context.text is held and torch.equal(held, torch.ones(2))
    assert float(inputs.latents[0, 0]) == 1 and float(inputs.timesteps) == 2
    assert inputs.size == 4 * (4 + 1 + 2)


def bench_with(pipeline: Pipeline, graphs: GraphedPasses | None) -> Bench:
    bench = Bench(pipeline)
    bench.runner.forwards.graphs = graphs
    for name, steps in (("short", 5), ("long", 9)):
        bench.add(name, prompt=name, num_inference_steps=steps, seed=len(name))
    bench.run()
    assert not bench.errors
    return bench


def graphed(pipeline: Pipeline, counters: Counters, **more: Any) -> GraphedPasses:
    return GraphedPasses(
        pipeline.velocity, counters, budget=1 << 30, always=True, **{"capture": Rerun, **more}
    )


def count(counters: Counters, name: str, **labels: str) -> float:
    found = [m for m in counters.metrics() if m.name == name and labels.items() <= m.labels.items()]
    return sum(metric.value for metric in found)


def test_steps_are_replayed_and_equal_bit_for_bit(pipeline: Pipeline) -> None:
    """Two rows, then the one that is left: a graph of each."""
    counters = Counters()
    ours, plain = bench_with(pipeline, graphed(pipeline, counters)), bench_with(pipeline, None)
    for name in ("short", "long"):
        assert torch.equal(ours.latents[name][0], plain.latents[name][0])
    assert count(counters, "graph_captures_total", result="made") == 2
    assert count(counters, "graph_replays_total") == (5 - 3) + (4 - 3)
    assert count(counters, "graph_bytes") > 0 and count(counters, "graphs") == 2


def test_a_pass_that_cannot_be_captured_stays_eager(pipeline: Pipeline) -> None:
    def fail(*given: Any) -> Rerun:
        raise RuntimeError("operation not permitted when stream is capturing")

    counters = Counters()
    bench = bench_with(pipeline, graphed(pipeline, counters, capture=fail))
    assert set(bench.outbox.outputs) == {"short", "long"}
    assert count(counters, "graph_captures_total", result="failed") == 2
    assert count(counters, "graph_replays_total") == 0


def test_a_batch_with_other_prompts_is_written_into_the_same_graph(pipeline: Pipeline) -> None:
    counters = Counters()
    graphs = graphed(pipeline, counters)
    for prompt in ("a cat", "two dogs on a hill"):
        ours, plain = Bench(pipeline), Bench(pipeline)
        ours.runner.forwards.graphs = graphs
        for bench in (ours, plain):
            bench.add("job", prompt=prompt, num_inference_steps=5)
            bench.run()
        assert torch.equal(ours.latents["job"][0], plain.latents["job"][0])
    assert count(counters, "graph_captures_total", result="made") == 1
    assert count(counters, "graph_replays_total") == 2 + 5


def test_steps_of_which_no_graph_is_made_are_told(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """With a memory of earlier steps, with several sizes. What an adapter of a request changes
    before its steps makes no difference to them."""
    counters = Counters()
    bench = Bench(pipeline)
    bench.runner.forwards.graphs = graphed(pipeline, counters)
    few = {"num_inference_steps": 2, "num_frames": 1}
    bench.add("adapted", **few).blend = make_blend([])
    bench.add("reusing", **few, enable_teacache=True)
    with caplog.at_level("INFO"):
        bench.run()
        bench.add("small", **few)
        bench.add("large", **{**few, "width": 64})
        bench.run()
    assert len(bench.outbox.outputs) == 4 and not bench.errors
    assert count(counters, "graph_bypasses_total", reason="adapters") == 0
    for reason in ("step_cache", "sizes"):
        assert count(counters, "graph_bypasses_total", reason=reason) == 2, reason
        assert caplog.text.count(f"{BYPASSED[reason]}: such steps run without a graph") == 1
    assert count(counters, "graph_captures_total") == 0


def test_the_kernels_of_a_step_are_counted(pipeline: Pipeline) -> None:
    counters = Counters()
    graphs = GraphedPasses(pipeline.velocity, counters, budget=1 << 30, always=False, capture=Rerun)
    bench_with(pipeline, graphs)
    kernels = [shape.kernels for shape in graphs._plan._shapes.values()]
    assert len(kernels) == 2 and all(50 < number < 5000 for number in kernels)


def test_who_asks_for_graphs_is_told_why_there_are_none(pipeline: Pipeline) -> None:
    wanted = EngineOptions(cuda_graphs="on")
    on_gpu = copy.copy(pipeline)
    on_gpu.device = torch.device("cuda")
    away = Offloaded(component="transformer", away=1, resident=1, buffers=1)
    offloaded = copy.copy(on_gpu)
    offloaded.card = dataclasses.replace(pipeline.card, offload=(away,))
    cases: list[tuple[EngineOptions, Any, str]] = [
        (wanted, pipeline, "runs on the CPU"),
        (replace(wanted, num_gpus=2), on_gpu, "several ranks"),
        (wanted, offloaded, "come and go"),
        (wanted, SimpleNamespace(), "through diffusers"),
    ]
    for options, served, reason in cases:
        with pytest.raises(ConfigError, match=reason):
            chosen_graphs(options, served)
        assert chosen_graphs(replace(options, cuda_graphs="auto"), served) == ""
    for mode, chosen in (("on", "on"), ("auto", "auto"), ("off", "")):
        assert chosen_graphs(EngineOptions(cuda_graphs=mode), on_gpu) == chosen  # type: ignore[arg-type]
