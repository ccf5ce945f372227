"""The denoise benchmark on small cases: its rows, stages, FLOP and the clock it uses."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import bench_denoise
from benchmarks.denoise_cases import SMALL, Step
from benchmarks.denoise_stages import LAYERS, OPS, REST, flop, stages
from sgl_diffusion.bench.case import Bar
from sgl_diffusion.bench.timing import Clock

CPU = torch.device("cpu")
KNOWN = {stage for _, stage in LAYERS + OPS} | {REST}


def test_flop_are_those_of_the_shapes() -> None:
    step = Step(SMALL[0], CPU, torch.float32)
    linear, attention = flop(step.model, step.ours)
    rows, tokens, text, width, ffn, layers = 2, SMALL[0].tokens, 9, 256, 128, 2
    block = tokens * (6 * width * width + 2 * width * ffn)  # the text's keys are made before
    ends = tokens * 2 * 64 * width + 256 * width + width * width + 6 * width * width
    assert linear == 2 * rows * (layers * block + ends)
    assert attention == 4 * rows * layers * tokens * (tokens + text) * width


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_stages_are_the_time_of_a_step(case: Any) -> None:
    step = Step(case, CPU, torch.float32)
    for model, work in ((step.model, step.ours), (step.peer, step.theirs)):
        start = time.perf_counter()
        spent = stages(model, work, CPU)
        whole = (time.perf_counter() - start) * 1e3
        assert set(spent) <= KNOWN and {"attention", "qkv product", "out product"} <= set(spent)
        assert {"MLP products", "activation", "embeddings"} <= set(spent)
        assert list(spent.values()) == sorted(spent.values(), reverse=True)
        assert sum(spent.values()) < whole
        assert not any(layer._forward_hooks for layer in model.modules())


def test_a_step_without_blocks_keeps_the_model() -> None:
    step = Step(SMALL[0], CPU, torch.float32)
    before = step.ours(), step.theirs()
    with step.without_blocks():
        assert flop(step.model, step.ours)[1] == 0
        torch.testing.assert_close(step.ours(), step.theirs())
        assert not torch.equal(step.ours(), before[0])
    assert torch.equal(step.ours(), before[0]) and torch.equal(step.theirs(), before[1])


def test_rows_have_bars_limits_and_lines() -> None:
    case = replace(SMALL[0], eager=Bar(0.0, 1e6), compiled=Bar(1.0, 1.0))
    clock = Clock("cpu", 2, 0.0, processor=True)  # what others take of the machine is not in it
    rows = bench_denoise.case_rows(case, clock, compiled=False)
    ours, theirs, around = rows
    assert (ours["by"], theirs["by"], around["by"]) == ("ours", "diffusers", "engine")
    assert ours["bars"] == {"diffusers": {"must": 0.0, "aim": 1e6, "met": True}}
    assert ours["vs"]["diffusers"] == pytest.approx(theirs["blocks_ms"] / ours["blocks_ms"])
    assert 0 < ours["products"] < 1 and ours["apart"] < 1e-5 and theirs["apart"] == 0
    assert 0 < around["adapters off ms"] < around["ms"] < ours["ms"]
    text = "\n".join(bench_denoise.lines({"machine": {"cpu": "x"}, "rows": rows}))
    assert "bar 0.0x, aim 1000000.0x: met" in text and "MLP products" in text


def test_processor_time_leaves_out_waiting() -> None:
    def wait() -> None:
        time.sleep(0.05)

    clocks = {name: Clock("cpu", 3, 0.0, processor=name == "own") for name in ("own", "wall")}
    seconds = {name: clock.compare({"wait": wait})["wait"] for name, clock in clocks.items()}
    assert seconds["own"] < 0.04 < seconds["wall"]


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_the_compiled_peer_runs() -> None:
    rows = bench_denoise.denoise(SMALL, "cpu", None)
    assert {row["by"] for row in rows} == {"ours", "diffusers", "diffusers compile", "engine"}
    assert all(row["ms"] > 0 and row.get("apart", 0) < 1e-5 for row in rows)
