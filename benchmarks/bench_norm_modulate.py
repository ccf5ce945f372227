"""norm_modulate on the CPU in bf16: ours, torch eager and torch.compile, and a plain copy.

    python benchmarks/bench_norm_modulate.py [--threads N] [--save]

One run of a DiT block's first op: x [1, 4096, D] in bf16, scale and shift [1, 1, D] in fp32. GB/s
counts x read once and the result written once, the least there is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from sgl_diffusion import ops
from tests.refs.norm_modulate import norm_modulate as reference

TOKENS = 4096
WIDTHS = (1536, 3072, 5120)  # Wan 1.3B, FLUX, Wan 14B
EPS = 1e-6


def chain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The op as the model libraries write it."""
    y = functional.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return (y * (1 + scale) + shift).type_as(x)


def row(width: int, repeats: int) -> dict[str, Any]:
    x = torch.randn(1, TOKENS, width).bfloat16()
    scale, shift = torch.randn(2, 1, 1, width)
    compiled = torch.compile(chain, dynamic=False)
    ops.reset_counts()
    got = ops.norm_modulate(x, scale, shift, eps=EPS)
    ((_, implementation),) = ops.counts()
    want = reference(x, scale, shift, eps=EPS)
    seconds = harness.compare(
        {
            "eager": lambda: chain(x, scale, shift),
            "compile": lambda: compiled(x, scale, shift),
            "ours": lambda: ops.norm_modulate(x, scale, shift, eps=EPS),
            "copy": harness.copy_of(x),
        },
        repeats,
    )
    moved = 2 * x.numel() * x.element_size() / 1e9
    return {
        "shape": f"{TOKENS}x{width}",
        "implementation": implementation,
        **{f"{name}_ms": value * 1e3 for name, value in seconds.items()},
        "vs_eager": seconds["eager"] / seconds["ours"],
        "vs_compile": seconds["compile"] / seconds["ours"],
        "GB/s": moved / seconds["ours"],
        "copy_GB/s": moved / seconds["copy"],
        "error": ((got.double() - want).norm() / want.norm()).item(),
    }


def main() -> None:
    options = harness.arguments(__doc__)
    torch.set_num_threads(options.threads)
    harness.keep_freed_memory()
    with torch.inference_mode():
        rows = [row(width, options.repeats) for width in WIDTHS]
    harness.report("norm_modulate", rows, save=options.save)


if __name__ == "__main__":
    main()
