"""Adapters on the layers of a whole model in bf16: ours against PEFT's merge and unmerge.

    python benchmarks/bench_lora.py [--threads N] [--repeats N] [--blocks N] [--save]

The layers are those of one block of Wan 1.3B and of FLUX, with an adapter on each: they are merged
one after another, so more blocks take longer in proportion on both sides, which have their adapters
loaded. `set` merges one into plain weights, `switch` replaces it by another, `unmerge` restores the
weights: ours bit for bit, PEFT's by subtracting. The copy is of all weights;
ours also writes and reads what the exact unmerge needs. The step is one pass of 8 rows of 512
tokens through the layers, each row with a rank-16 adapter of its own, over one without adapters.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import lora_page
from benchmarks.harness import Busy, finish, machine
from sgl_diffusion.base.lora import LoraSetting, LoraUse
from sgl_diffusion.bench.timing import keep_freed_memory
from sgl_diffusion.engine.lora.manager import Loras
from sgl_diffusion.engine.lora.rows import RowAdapters
from sgl_diffusion.engine.lora.state import StateFile
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.loader.adapters.types import Adapter, LowRank
from sgl_diffusion.loader.rules import Rules

RANKS = {16: 0.08, 64: 0.16, 128: 0.57}  # and |update| / |weight|, rms
MODELS = {
    "Wan 1.3B": [(1536, 1536)] * 8 + [(8960, 1536), (1536, 8960)],
    "FLUX": [(3072, 3072)] * 8 + [(12288, 3072), (3072, 12288)],
}
ROWS, TOKENS = 8, 512


def build(blocks: int, shapes: list[tuple[int, int]]) -> nn.Module:
    model = nn.Module()
    for block in range(blocks):
        for index, (out, width) in enumerate(shapes):
            layer = Linear(width, out, bias=False)
            layer.weight.data = (0.02 * torch.randn(out, width)).bfloat16()
            model.add_module(f"layer_{block}_{index}", layer)
    return model.requires_grad_(False)


def adapter(model: nn.Module, rank: int, ratio: float) -> Adapter:
    modules = {}
    for name, layer in model.named_children():
        out, width = layer.weight.shape
        down = torch.randn(rank, width) / width**0.5
        up = torch.randn(out, rank) * 0.02 * ratio * (width / rank) ** 0.5
        modules[name] = (LowRank(down.bfloat16(), up.bfloat16(), 1.0),)
    return Adapter("PEFT", "", {"transformer": modules})


def manager(model: nn.Module, adapters: dict[str, Adapter], rows: RowAdapters) -> Loras:
    component = Adaptable(model, Rules(), "")
    loras = Loras(
        {"transformer": component},
        lambda source: adapters[source.path],
        rows=rows,
        budget=2**40,
        state=StateFile(None, ""),
    )
    while not loras.prepare([LoraSetting(nickname=name, path=name) for name in adapters]):
        time.sleep(0.01)
    return loras


def peft_layers(model: nn.Module, adapters: dict[str, Adapter], rank: int) -> list[Any]:
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, _ in model.named_children()]
    for name, given in adapters.items():
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        inject_adapter_in_model(config, model, adapter_name=name)
        for module, (delta,) in given.components["transformer"].items():
            layer = model.get_submodule(module)
            assert isinstance(delta, LowRank)
            layer.lora_A[name].weight.data = delta.down
            layer.lora_B[name].weight.data = delta.up
    return [layer for _, layer in model.named_children()]


def in_turns(works: list[tuple[str, Callable[[], Any]]], repeats: int) -> dict[str, float]:
    """Median seconds of works that have to run in this order."""
    times: dict[str, list[float]] = {name: [] for name, _ in works}
    for turn in range(repeats + 1):
        for name, work in works:
            start = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spans) for name, spans in times.items()}


def run(model: nn.Module, inputs: dict[int, Tensor]) -> None:
    for layer in model.children():
        layer(inputs[layer.weight.shape[1]])


def row(name: str, rank: int, repeats: int, blocks: int) -> dict[str, Any]:
    ours = build(blocks, MODELS[name])
    theirs = copy.deepcopy(ours)
    adapters = {"a": adapter(ours, rank, RANKS[rank]), "b": adapter(ours, rank, RANKS[rank])}
    base = {n: layer.weight.clone() for n, layer in ours.named_children()}
    rows = RowAdapters(torch.device("cpu"))
    loras = manager(ours, adapters, rows)
    wrapped = peft_layers(theirs, adapters, rank)
    targets = [torch.empty_like(weight) for weight in base.values()]

    def choose(which: str) -> None:
        loras.replace([LoraSetting(nickname=which)], "merge")

    def every(act: Callable[[Any], Any]) -> None:
        for layer in wrapped:
            act(layer)

    works = [
        ("copy", lambda: [t.copy_(w) for t, w in zip(targets, base.values(), strict=True)]),
        ("set", lambda: choose("a")),
        ("switch", lambda: choose("b")),
        ("unmerge", lambda: loras.unmerge("all")),
        ("peft_set", lambda: every(lambda layer: layer.merge(adapter_names=["a"]))),
        (
            "peft_switch",
            lambda: every(lambda layer: (layer.unmerge(), layer.merge(adapter_names=["b"]))),
        ),
        ("peft_unmerge", lambda: every(lambda layer: layer.unmerge())),
    ]
    seconds = in_turns(works, repeats)
    exact = all(torch.equal(layer.weight, base[n]) for n, layer in ours.named_children())
    assert exact, "the weights did not come back"
    choose("a")
    bits = loras.report()["memory"]["unmerge_bits_per_weight"]
    loras.unmerge("all")
    step = step_ratio(ours, loras, rows, adapters, repeats) if rank == min(RANKS) else None
    total = sum(seconds[n] for n in ("set", "switch", "unmerge"))
    theirs_total = sum(seconds[f"peft_{n}"] for n in ("set", "switch", "unmerge"))
    return {
        "model": name,
        "blocks": blocks,
        "rank": rank,
        **{f"{n}_ms": value * 1e3 for n, value in seconds.items()},
        "vs_peft": theirs_total / total,
        "set_per_copy": seconds["set"] / seconds["copy"],
        "unmerge_per_copy": seconds["unmerge"] / seconds["copy"],
        "bits/weight": bits,
        "step_ratio": step,
    }


def step_ratio(
    model: nn.Module,
    loras: Loras,
    rows: RowAdapters,
    adapters: dict[str, Adapter],
    repeats: int,
) -> float:
    """A pass with eight adapters over one without."""
    for index in range(ROWS):
        adapters[f"own{index}"] = adapter(model, 16, RANKS[16])
    names = [f"own{index}" for index in range(ROWS)]
    while not loras.prepare([LoraSetting(nickname=name, path=name) for name in names]):
        time.sleep(0.01)
    blends = [loras.blend([LoraUse(nickname=name)]) for name in names]
    widths = {layer.weight.shape[1] for layer in model.children()}
    inputs = {width: torch.randn(ROWS, TOKENS, width).bfloat16() for width in widths}

    def adapted() -> None:
        with rows.of(blends):
            run(model, inputs)

    def plain() -> None:
        with rows.of([None] * ROWS):
            run(model, inputs)

    seconds = in_turns([("plain", plain), ("adapted", adapted)], max(repeats // 2, 1))
    return seconds["adapted"] / seconds["plain"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=1, help="of each model")
    parser.add_argument(
        "--save", action="store_true", help="write the results and docs/measured.md"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = []
    begin, other = time.perf_counter(), Busy()
    with torch.inference_mode():
        for name in MODELS:
            for rank in RANKS:
                rows.append(row(name, rank, options.repeats, options.blocks))
                print(", ".join(f"{key} {_shown(value)}" for key, value in rows[-1].items()))
    facts["repeats"] = options.repeats
    facts["seconds"] = round(time.perf_counter() - begin)
    facts["other_cores"] = other.cores()
    record = {"benchmark": "lora", "machine": facts, "rows": rows}
    path = finish(record, options.save)
    if options.save:
        lora_page.write(record, path)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
