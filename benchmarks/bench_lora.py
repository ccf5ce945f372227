"""lora_merge_ and lora_unmerge_ on the CPU in bf16: ours, PEFT's merge, torch.addmm, and a copy.

    python benchmarks/bench_lora.py [--threads N] [--save]

PEFT's merge on a CPU is `weight += ((up.float() @ down.float()) * scale).bfloat16()`, which rounds
twice; addmm rounds once. Neither can be undone exactly; ours also writes the record that can. The
merges are repeated with the opposite sign in turns, so that the weights stay what they are. GB/s
counts the weight read and written once.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from sgl_diffusion import ops
from sgl_diffusion.ops import LoraDelta
from tests.refs.lora import lora_merge_ as reference
from tests.refs.lora import random_weight

SHAPES = ((8960, 1536), (3072, 12288))  # Wan 1.3B, FLUX
RANKS = (16, 64, 128)
RATIOS = {16: 0.08, 64: 0.16, 128: 0.57}  # |update| / |weight|, rms


def peft_merge(weight: Tensor, delta: LoraDelta) -> None:
    """`LoraLayer.merge` without `safe_merge`, for one adapter."""
    update = (delta.up.float() @ delta.down.float()) * delta.scale
    weight += update.to(delta.up.dtype)


def addmm_merge(weight: Tensor, delta: LoraDelta) -> None:
    torch.addmm(weight, delta.up, delta.down, alpha=delta.scale, out=weight)


def row(shape: tuple[int, int], rank: int, repeats: int) -> dict[str, Any]:
    base, delta = random_weight(*shape, rank, RATIOS[rank], torch.bfloat16, torch.bfloat16)
    want = reference(base, [delta])
    weight = base.clone()
    ops.reset_counts()
    (record,) = ops.lora_merge_([weight], [[delta]])
    ((_, implementation),) = ops.counts()
    error = ((weight.double() - want).norm() / want.norm()).item()
    del want
    ops.lora_unmerge_([weight], [record])
    assert torch.equal(weight, base)
    (record,) = ops.lora_merge_([weight], [[delta]])
    merged, target = weight.clone(), torch.empty_like(weight)
    deltas = itertools.cycle((replace(delta, scale=-delta.scale), delta))
    seconds = harness.compare(
        {
            "peft": lambda: peft_merge(weight, next(deltas)),
            "addmm": lambda: addmm_merge(weight, next(deltas)),
            "ours": lambda: ops.lora_merge_([weight], [[next(deltas)]]),
            # A record undoes what it was made for: the unmerge is timed with a copy before it.
            "restore": lambda: ops.lora_unmerge_([target.copy_(merged)], [record]),
            "copy": lambda: target.copy_(merged),
        },
        repeats,
    )
    unmerge = seconds.pop("restore") - seconds["copy"]
    moved = 2 * base.nbytes / 1e9
    units = torch.ops.sgld.lora_cpu_units() if implementation == "cpu" else ""
    return {
        "shape": f"{shape[0]}x{shape[1]}",
        "rank": rank,
        "update/weight": RATIOS[rank],
        "implementation": f"{implementation} {units}".strip(),
        **{f"{name}_ms": value * 1e3 for name, value in seconds.items()},
        "unmerge_ms": unmerge * 1e3,
        "vs_peft": seconds["peft"] / seconds["ours"],
        "vs_addmm": seconds["addmm"] / seconds["ours"],
        "GB/s": moved / seconds["ours"],
        "copy_GB/s": moved / seconds["copy"],
        "bits/weight": record.bits_per_weight,
        "error": error,
    }


def main() -> None:
    options = harness.arguments(__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    harness.keep_freed_memory()
    with torch.inference_mode():
        rows = [row(shape, rank, options.repeats) for shape in SHAPES for rank in RANKS]
    harness.report("lora", rows, save=options.save)


if __name__ == "__main__":
    main()
