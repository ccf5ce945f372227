"""Denoise passes as CUDA graphs: replays have the bits of eager passes, whatever changes.

Not yet run on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sgl_diffusion import ops
from sgl_diffusion.engine.counters import Counters
from sgl_diffusion.engine.graphs.capture import CapturedPass
from sgl_diffusion.engine.graphs.passes import Adapted, GraphedPasses
from sgl_diffusion.engine.lora.layout import Layouts
from sgl_diffusion.engine.lora.rows import Blend, RowAdapters
from sgl_diffusion.models.wan import TextContext, WanParams, WanTransformer
from sgl_diffusion.ops import LoraDelta
from tests.gpu.common import fresh, same

pytestmark = pytest.mark.gpu

PARAMS = WanParams(
    num_attention_heads=2, attention_head_dim=128, text_dim=64, ffn_dim=512, num_layers=2
)


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    torch.manual_seed(0)
    made = WanTransformer(PARAMS)
    for parameter in made.parameters():
        nn.init.normal_(parameter, float(parameter.dim() == 1), 0.05)
    return made.to("cuda", torch.bfloat16).eval()


class Passes:
    """The model as a pipeline runs it."""

    def __init__(self, model: WanTransformer) -> None:
        self._model = model

    def __call__(self, latents: Tensor, timesteps: Tensor, context: TextContext, _: int) -> Tensor:
        output: Tensor = self._model(latents, timesteps, context)
        return output


def given(model: WanTransformer, rows: int, side: int) -> tuple[Tensor, Tensor, TextContext, int]:
    latents = fresh(rows, 16, 1, side, side, dtype=torch.float32)
    timesteps = torch.rand(rows, device="cuda") * 1000
    return latents, timesteps, model.prepare(fresh(rows, 32, 64)), 0


@torch.inference_mode()
def test_a_replay_has_the_bits_of_an_eager_pass(model: WanTransformer) -> None:
    run = Passes(model)
    graph = CapturedPass(run, *given(model, 2, 16))
    assert graph.size > 0
    for _ in range(3):
        latents, timesteps, context, _ = arguments = given(model, 2, 16)
        want = run(*arguments)
        for _ in range(2):
            assert same(graph.replay(latents, timesteps, context), want)


@torch.inference_mode()
def test_a_merged_adapter_is_in_the_next_replay(model: WanTransformer) -> None:
    run = Passes(model)
    latents, timesteps, context, _ = arguments = given(model, 1, 16)
    graph = CapturedPass(run, *arguments)
    before = graph.replay(latents, timesteps, context).clone()
    weight = model.get_parameter("blocks.0.attn1.to_qkv.weight").data
    delta = LoraDelta(fresh(4, weight.shape[1]), fresh(weight.shape[0], 4, size=0.2))
    records = ops.lora_merge_([weight], [[delta]])
    merged = graph.replay(latents, timesteps, context).clone()
    assert same(merged, run(*arguments)) and not same(merged, before)
    ops.lora_unmerge_([weight], records)
    assert same(graph.replay(latents, timesteps, context), before)


def adapter(model: WanTransformer, rank: int, scale: float) -> Blend:
    """On every layer of the blocks; of fused ones, on a segment by itself as well."""
    layers = {}
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            out, width = module.weight.shape
            deltas = [LoraDelta(fresh(rank, width, size=0.1), fresh(out, rank, size=0.1), scale)]
            if name.endswith("to_qkv"):
                up = fresh(out // 3, rank, size=0.1)
                deltas.append(LoraDelta(fresh(rank, width, size=0.1), up, -scale, out // 3))
            layers[module] = tuple(deltas)
    return Blend((), layers)


@torch.inference_mode()
@pytest.mark.parametrize("rank", [4, 200])
@pytest.mark.parametrize("by", ["torch", "triton"])
def test_adapters_of_rows_change_without_a_new_graph(
    model: WanTransformer, by: str, rank: int
) -> None:
    """Other factors, strengths and rows; replays have the bits of passes with the same slots."""
    counters, run, rows = Counters(), Passes(model), RowAdapters(torch.device("cuda"))
    graphs = GraphedPasses(run, counters, budget=1 << 32, always=True)
    layouts = Layouts([model])
    a, b, c = (adapter(model, rank, scale) for scale in (1.0, -0.5, 0.3))
    cases = [[a, None, b], [a, None, b], [a, None, b], [b, a, None], [c, c, a], [None, b, c]]
    with ops.using(lora_apply=by):
        for blends in cases:
            arguments = given(model, 3, 16)
            slots = graphs.slots(
                layouts.of([x for x in dict.fromkeys(blends) if x]), torch.device("cuda")
            )
            assert slots is not None
            adapted = Adapted(rows.through(slots, 3, run), slots, 3)
            with rows.of(blends, slots):
                want = run(*arguments).clone()
                got = graphs.velocity(*arguments, adapted).clone()
            with rows.of(blends):
                as_they_are = run(*arguments)
            assert same(got, want)
            error = (got.float() - as_they_are.float()).norm() / as_they_are.float().norm()
            assert error < 0.05
            torch.cuda.synchronize()
            graphs.took(1e-3)
            graphs.make()
    rows.clear()
    values = {metric.name: metric.value for metric in counters.metrics()}
    assert values["graph_captures_total"] == 1 and values["graph_replays_total"] == 3
    assert values["graph_adapter_copies_total"] == 4, "what is there is not copied again"


@torch.inference_mode()
def test_the_graph_used_longest_ago_gives_its_memory_back(model: WanTransformer) -> None:
    counters = Counters()
    one = CapturedPass(Passes(model), *given(model, 1, 16)).size
    graphs = GraphedPasses(Passes(model), counters, budget=int(2.5 * one), always=True)
    for side in (12, 14, 16, 12):
        arguments = given(model, 1, side)
        for _ in range(4):
            got = graphs.velocity(*arguments).clone()
            assert same(got, Passes(model)(*arguments))
            torch.cuda.synchronize()
            graphs.took(1e-3)
            graphs.make()
    values = {metric.name: metric.value for metric in counters.metrics()}
    assert values["graph_evictions_total"] >= 1 and values["graph_replays_total"] >= 3
    assert values["graph_bytes"] <= 2.5 * one
