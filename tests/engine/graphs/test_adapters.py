"""Graphs of steps whose rows have adapters of their own: who shares one, and equal bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgl_diffusion.base.lora import LoraUse
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.graphs.passes import Adapted, GraphedPasses
from sgl_diffusion.engine.lora.layout import Layout, Span
from sgl_diffusion.engine.lora.manager import Loras
from sgl_diffusion.engine.lora.rows import Blend
from sgl_diffusion.engine.pipeline import AdaptablePipeline, Pipeline
from sgl_diffusion.models.wan_weights import RULES
from tests.engine.bench import Bench
from tests.engine.graphs.tape import Tape
from tests.engine.lora.adapters import LAYERS, Shelf, low_rank

ATTENTION = [name for name in LAYERS if ".attn1." in name]
ROOM = 1 << 30


@pytest.fixture(scope="module")
def loras(pipeline: Pipeline) -> Loras:
    """a, b, and c of a lower rank on all layers; `narrow` on some; `wide` with a larger rank."""
    assert isinstance(pipeline, AdaptablePipeline)
    shelf = Shelf(
        a=low_rank(1),
        b=low_rank(2),
        c=low_rank(3, rank=2),
        narrow=low_rank(4, names=ATTENTION),
        wide=low_rank(5, rank=20),
    )
    modules = [part.module for part in pipeline.adaptables().values()]
    return shelf.manager(*modules, rules=RULES)


def wear(loras: Loras, *uses: tuple[str, float]) -> Blend | None:
    if not uses:
        return None
    return loras.blend([LoraUse(nickname=name, path=name, strength=s) for name, s in uses])


def never(*given: Any) -> Tape:
    raise RuntimeError("operation not permitted when stream is capturing")


class Served:
    """One runner for many batches, whose passes are recorded, or stay eager."""

    def __init__(self, pipeline: Pipeline, capture: Any = Tape, budget: int = ROOM) -> None:
        self.counters = Counters()
        self.bench = Bench(pipeline)
        self.graphs = GraphedPasses(
            pipeline.velocity, self.counters, budget=budget, always=True, capture=capture
        )
        self.bench.runner.forwards.graphs = self.graphs

    def latents(self, blends: Sequence[Blend | None], steps: int = 5, **wish: Any) -> list[Tensor]:
        """Of jobs that share all their steps."""
        names = [f"{len(self.bench.latents)}-{n}" for n in range(len(blends))]
        for n, (name, blend) in enumerate(zip(names, blends, strict=True)):
            few = {"num_inference_steps": steps, "num_frames": 1, "prompt": "a cat", "seed": n}
            self.bench.add(name, **{**few, **wish}).blend = blend
        self.bench.run()
        assert not self.bench.errors, self.bench.errors
        return [self.bench.latents[name][0] for name in names]

    def count(self, name: str, **labels: str) -> int:
        found = (m for m in self.counters.metrics() if m.name == name)
        return int(sum(m.value for m in found if labels.items() <= m.labels.items()))

    @property
    def captures(self) -> int:
        return self.count("graph_captures_total", result="made")

    @property
    def copies(self) -> int:
        return self.count("graph_adapter_copies_total")


def plain(pipeline: Pipeline, blends: Sequence[Blend | None]) -> list[Tensor]:
    """As without graphs."""
    served = Served(pipeline)
    served.bench.runner.forwards.graphs = None
    return served.latents(blends)


def test_other_adapters_and_strengths_are_in_the_same_graph(
    pipeline: Pipeline, loras: Loras
) -> None:
    """Bit for bit what the passes give as they are; and what they give without slots, nearly."""
    recorded, eager = Served(pipeline), Served(pipeline, never)
    worn = [(("a", 1.0),), (("b", 1.0),), (("a", -0.5),), (("c", 2.0),), (("a", 1.0),)]
    every = []
    for uses in worn:
        blends = [wear(loras, *uses)]
        (found,), (want,) = recorded.latents(blends), eager.latents(blends)
        assert torch.equal(found, want)
        (without,) = plain(pipeline, blends)
        assert (found - without).abs().max() <= 1e-5 * without.abs().max()
        every.append(found)
    assert recorded.captures == 1 and eager.captures == 0
    assert recorded.count("graph_replays_total") == 2 + 4 * 5
    assert recorded.count("graph_bypasses_total") == 0
    assert torch.equal(every[0], every[-1])
    assert not any(torch.equal(every[0], other) for other in every[1:-1])


def test_rows_change_their_adapters_in_the_same_graph(pipeline: Pipeline, loras: Loras) -> None:
    """Two of three rows have one; which, is written into the graph as well."""
    recorded, eager = Served(pipeline), Served(pipeline, never)
    a, b, none = wear(loras, ("a", 1.0)), wear(loras, ("b", 0.7)), None
    for blends in ([a, none, b], [b, a, none], [none, b, a], [none, a, b]):
        for found, want in zip(recorded.latents(blends), eager.latents(blends), strict=True):
            assert torch.equal(found, want)
    assert recorded.captures == 1 and recorded.copies == 2, "they are there already"
    alone = plain(pipeline, [a, none, b])
    for found, want in zip(recorded.latents([a, none, b]), alone, strict=True):
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def test_several_adapters_of_one_request_are_one_in_the_graph(
    pipeline: Pipeline, loras: Loras
) -> None:
    recorded = Served(pipeline)
    for uses in ((("a", 1.0), ("b", -0.5)), (("narrow", 1.0), ("c", 0.5))):
        blends = [wear(loras, *uses)]
        (found,), (want,) = recorded.latents(blends), plain(pipeline, blends)
        assert (found - want).abs().max() <= 1e-5 * want.abs().max()
    assert recorded.captures == 1, "ranks of 8 and of 6 have the room of 16"


def test_another_layout_is_another_graph(pipeline: Pipeline, loras: Loras) -> None:
    recorded = Served(pipeline)
    kinds: list[list[Blend | None]] = [
        [None],
        [wear(loras, ("a", 1.0))],
        [wear(loras, ("narrow", 1.0))],
        [wear(loras, ("wide", 1.0))],
        [wear(loras, ("a", 1.0)), wear(loras, ("b", 1.0))],
        [wear(loras, ("a", 1.0)), wear(loras, ("a", 1.0))],
    ]
    for number, blends in enumerate(kinds, 1):
        recorded.latents(blends)
        assert recorded.captures == number
    for blends in kinds:
        recorded.latents(blends)
    assert recorded.captures == len(kinds)


def test_guidance_or_not_is_another_graph_though_the_shapes_are_equal(
    pipeline: Pipeline, loras: Loras
) -> None:
    """Two rows without guidance are as many as one with it."""
    recorded, a, b = Served(pipeline), wear(loras, ("a", 1.0)), wear(loras, ("b", 1.0))
    guided = {"guidance_scale": 4.0, "negative_prompt": "a dog"}
    (one,) = recorded.latents([a], **guided)
    recorded.latents([a, b], guidance_scale=1.0)
    assert recorded.captures == 2
    assert torch.equal(one, *recorded.latents([a], **guided))


def test_what_is_too_large_for_graphs_runs_without(
    pipeline: Pipeline, loras: Loras, caplog: pytest.LogCaptureFixture
) -> None:
    served, blends = Served(pipeline, budget=1000), [wear(loras, ("a", 1.0))]
    with caplog.at_level("INFO"):
        (found,) = served.latents(blends)
    assert torch.equal(found, *plain(pipeline, blends))
    assert served.count("graph_bypasses_total", reason="adapters") == 5
    assert "adapters of single requests" in caplog.text and served.captures == 0


def test_adapters_and_graphs_share_one_budget(pipeline: Pipeline, loras: Loras) -> None:
    """What graphs read goes after them, and never before."""
    whole = Served(pipeline)
    blends = [[wear(loras, (name, 1.0))] for name in ("a", "narrow", "wide")]
    want = [whole.latents(each) for each in blends]
    most = whole.count("graph_bytes") * 2 // 3
    tight = Served(pipeline, budget=most)
    for _ in range(2):
        for each, (wanted,) in zip(blends, want, strict=True):
            (found,) = tight.latents(each)
            assert torch.equal(found, wanted)
            assert tight.count("graph_bytes") <= most
    assert tight.count("graph_evictions_total") > 0 and tight.count("graph_replays_total") > 0
    tight.graphs.clear()
    assert tight.count("graph_bytes") == 0
    assert torch.equal(*tight.latents(blends[0]), *want[0])


@torch.inference_mode()
def test_a_graph_that_is_due_for_slots_that_had_to_go_is_not_made() -> None:
    """Nobody would write adapters into what it reads."""
    span = Span(0, 8, 8, 16, torch.float32)
    layouts = [Layout(1, ((nn.Linear(8, 8), (span,)),)) for _ in range(3)]

    def run(latents: Tensor, timesteps: Tensor, context: Any, expert: int) -> Tensor:
        return 2 * latents

    def graphs_with(others: int) -> tuple[GraphedPasses, Counters]:
        counters = Counters()
        budget = 2 * layouts[0].nbytes + 100
        graphs = GraphedPasses(run, counters, budget=budget, always=True, capture=Tape)
        slots = graphs.slots(layouts[0], torch.device("cpu"))
        assert slots is not None
        for _ in range(3):
            graphs.velocity(torch.ones(2), torch.ones(1), (), 0, Adapted(run, slots, 1))
            graphs.took(1.0)
        for layout in layouts[1 : 1 + others]:
            graphs.slots(layout, torch.device("cpu"))
        graphs.make()
        return graphs, counters

    for others, made in ((1, 1), (2, 0)):
        graphs, counters = graphs_with(others)
        found = [m.value for m in counters.metrics() if m.name == "graph_captures_total"]
        assert sum(found) == made
