"""Compiled blocks: how many graphs there are, when blocks run as they are, and equal results."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError, SetupError
from sgl_diffusion.base.footprint import Offloaded
from sgl_diffusion.engine.compiled import CompiledBlocks, check_compile
from sgl_diffusion.engine.graphs.passes import chosen_graphs
from sgl_diffusion.engine.pipeline import Pipeline
from sgl_diffusion.engine.transformers import transformers
from sgl_diffusion.engine.worker import DiffusionWorker
from tests.engine.bench import Bench
from tests.engine.outbox import RecordingOutbox
from tests.engine.test_quantise import opened
from tests.engine.test_worker import finish, payload

SIZES = {"small": {"width": 192, "height": 192}, "wide": {"width": 176, "height": 192}}


class Traced:
    """As a backend of torch.compile: runs what was traced, and counts it."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@dataclasses.dataclass
class Compiled:
    pipeline: Pipeline
    blocks: CompiledBlocks
    traced: Traced

    def calls(self) -> tuple[int, int]:
        """Of blocks, and of those that ran as they are."""
        found = {metric.name: int(metric.value) for metric in self.blocks.counters.metrics()}
        self.blocks.counters.clear()
        return found.get("block_calls_total", 0), found.get("eager_block_calls_total", 0)


@pytest.fixture(scope="module")
def plain(tiny_wan_a: Path) -> Pipeline:
    return opened(tiny_wan_a)


@pytest.fixture(scope="module")
def compiled(tiny_wan_a: Path) -> Compiled:
    pipeline, traced = opened(tiny_wan_a), Traced()
    blocks = CompiledBlocks(transformers(pipeline), traced)
    blocks.warm_up(pipeline)
    return Compiled(pipeline, blocks, traced)


def latents(pipeline: Pipeline, jobs: int = 1, **wish: Any) -> list[Tensor]:
    bench = Bench(pipeline)
    for number in range(jobs):
        bench.add(str(number), num_frames=1, num_inference_steps=2, seed=number, **wish)
    bench.run()
    assert not bench.errors, bench.errors
    return [bench.latents[str(number)][0] for number in range(jobs)]


def test_one_graph_for_all_blocks_of_a_kind_whatever_the_size(
    plain: Pipeline, compiled: Compiled
) -> None:
    assert compiled.traced.graphs == 2, "of one row, and of several"
    compiled.calls()
    for size in SIZES.values():
        for more in ({}, {"guidance_scale": 1.0}):
            wish = {**size, **more}
            assert torch.equal(*latents(compiled.pipeline, **wish), *latents(plain, **wish))
            assert compiled.calls() == (4, 0), "two steps of two blocks"
    assert compiled.traced.graphs == 2


def test_nothing_is_compiled_for_a_request(plain: Pipeline, compiled: Compiled) -> None:
    """In a size so small that attention takes another way."""
    compiled.calls()
    wish = {"width": 32, "height": 32}
    assert torch.equal(*latents(compiled.pipeline, **wish), *latents(plain, **wish))
    assert compiled.calls() == (4, 4)
    assert compiled.traced.graphs == 2


def test_weights_that_change_in_place_are_used(plain: Pipeline, compiled: Compiled) -> None:
    """As merged adapters change them."""
    wish = SIZES["small"]
    before = latents(compiled.pipeline, **wish)
    weights = [transformers(p)[0].blocks[0].ffn.linear_1.weight for p in (plain, compiled.pipeline)]
    kept = weights[0].clone()
    for weight in weights:
        weight.data.mul_(1.5)
    compiled.calls()
    after = latents(compiled.pipeline, **wish)
    assert compiled.calls() == (4, 0)
    assert torch.equal(*after, *latents(plain, **wish)) and not torch.equal(*after, *before)
    for weight in weights:
        weight.data.copy_(kept)


def test_blocks_with_hooks_run_as_they_are(compiled: Compiled) -> None:
    """As the adapters of single requests hook themselves in."""
    wish = SIZES["small"]
    before = latents(compiled.pipeline, **wish)
    layer = transformers(compiled.pipeline)[0].blocks[1].ffn.linear_2
    calls = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module)
        return output + 1

    handle = layer.register_forward_hook(hook)
    compiled.calls()
    hooked = latents(compiled.pipeline, **wish)
    handle.remove()
    assert compiled.calls() == (4, 2) and len(calls) == 2
    assert not torch.equal(*hooked, *before)
    assert torch.equal(*latents(compiled.pipeline, **wish), *before)
    assert compiled.calls() == (4, 0)


def test_who_asks_for_it_is_told_why_it_cannot_be(plain: Pipeline) -> None:
    wanted = EngineOptions(enable_torch_compile=True)
    away = Offloaded(component="transformer", away=1, resident=1, buffers=1)
    offloaded = copy.copy(plain)
    offloaded.card = replace(plain.card, offload=(away,))
    cases: list[tuple[EngineOptions, Any, str]] = [
        (replace(wanted, num_gpus=2), plain, "several ranks"),
        (wanted, offloaded, "come and go"),
        (wanted, SimpleNamespace(), "through diffusers"),
    ]
    for options, served, reason in cases:
        with pytest.raises(ConfigError, match=f"--enable-torch-compile .*{reason}"):
            check_compile(options, served)
        check_compile(replace(options, enable_torch_compile=False), served)
    check_compile(wanted, plain)
    check_compile(replace(wanted, num_gpus=2, dp_size=2), plain)
    on_gpu = copy.copy(plain)
    on_gpu.device = torch.device("cuda")
    assert chosen_graphs(wanted, on_gpu) == ""
    with pytest.raises(ConfigError, match="blocks are compiled"):
        chosen_graphs(replace(wanted, cuda_graphs="on"), on_gpu)


def test_a_compiler_that_fails_ends_the_start(tiny_wan_a: Path) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise FileNotFoundError("no such compiler: /secret/path")

    pipeline = opened(tiny_wan_a)
    blocks = CompiledBlocks(transformers(pipeline), broken)
    with pytest.raises(SetupError, match=r"failed here \(FileNotFoundError\).*g\+\+") as caught:
        blocks.warm_up(pipeline)
    assert caught.value.code == "compile_failed" and "secret" not in str(caught.value)


def test_code_that_gives_other_numbers_ends_the_start(tiny_wan_a: Path) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def call(*args: Any) -> Any:
            return tuple(x.flip(-1) for x in graph.forward(*args))

        return call

    pipeline = opened(tiny_wan_a)
    blocks = CompiledBlocks(transformers(pipeline), wrong)
    with pytest.raises(SetupError, match="other results than the blocks as they are") as caught:
        blocks.warm_up(pipeline)
    assert caught.value.code == "compile_wrong"


PRECISIONS: list[dict[str, Any]] = [{}, {"dit_precision": "bf16"}, {"quantization": "int8"}]
OTHERS = ["flux_a", "flux2_klein", "sd3_a", "qwen_image_a", "z_image_a", "z_image_omni_a"]


@pytest.mark.slow  # a compiler at work for minutes
@pytest.mark.filterwarnings("default")  # it has its own
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("tiny_wan_a", options) for options in PRECISIONS),
        *((f"tiny_{family}", {}) for family in OTHERS),
        *(("tiny_flux_a", options) for options in PRECISIONS[1:]),
        ("tiny_kontext", {}),
    ],
    ids=str,
)
def test_generated_code_gives_what_blocks_give(
    family: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(family)
    pipelines = [opened(path, **options) for _ in range(2)]
    blocks = CompiledBlocks(transformers(pipelines[1]))
    blocks.warm_up(pipelines[1])
    for jobs, size in ((1, "small"), (3, "wide")):
        wants, founds = (latents(pipeline, jobs, **SIZES[size]) for pipeline in pipelines)
        for want, found in zip(wants, founds, strict=True):
            most = 5e-2 if options else 1e-5
            assert (found - want).abs().max() <= most * want.abs().max()
    counted = {metric.name: metric.value for metric in blocks.counters.metrics()}
    assert counted["block_calls_total"] > 0 and "eager_block_calls_total" not in counted


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.timeout(600)
def test_a_worker_compiles_before_its_first_job(tiny_wan_a: Path) -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    options = EngineOptions(model_path=str(tiny_wan_a), enable_torch_compile=True)

    def worker(outbox: RecordingOutbox) -> DiffusionWorker:
        return DiffusionWorker(lambda note: opened(tiny_wan_a), options, outbox)

    torch._dynamo.reset()  # nothing is there from other tests
    with (
        fresh_cache(),
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(SetupError, match="needs a C"),
    ):
        worker(RecordingOutbox()).load()
    outbox = RecordingOutbox()
    good = worker(outbox)
    good.load()
    assert "compiling the blocks" in outbox.notes
    card = opened(tiny_wan_a).card
    good.submit("a", payload(card, width=192, height=192))
    finish(good)
    assert len(outbox.outputs["a"]) == 1
    counted = {metric.name: metric.value for metric in good.metrics()}
    assert counted["block_calls_total"] == 4 and "eager_block_calls_total" not in counted
