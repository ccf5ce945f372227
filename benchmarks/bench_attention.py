"""attention on the CPU: ours and torch's scaled_dot_product_attention, and the peak of the core.

    python benchmarks/bench_attention.py [--threads N] [--save]

Self-attention of 12 heads in bf16 and fp32, and queries over the 512 keys of a text. GF/s counts
the two products; `share` is of what the instruction that the kernel uses reaches in registers:
build/native/sgld_peak measures it on one core.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import harness
from sgl_diffusion import ops
from tests.refs.attention import attention as reference

PEAK = Path(__file__).parents[1] / "build" / "native" / "sgld_peak"
HEADS = 12
# dtype, head dim, queries, keys
SHAPES = [
    *((torch.bfloat16, d, n, n) for d in (128, 64) for n in (1024, 2048, 4096, 8192)),
    *((torch.bfloat16, d, 4096, 512) for d in (128, 64)),
    *((torch.float32, d, n, n) for d in (128, 64) for n in (1024, 2048)),
]
CHECKED_ROWS = 64


def peaks() -> dict[str, float]:
    """GFLOP/s of one core by instruction."""
    done = subprocess.run([PEAK], capture_output=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def instruction(dtype: torch.dtype) -> str:
    """What the kernel of this dtype multiplies with."""
    isa = torch.ops.sgld.cpu_isa()
    if dtype == torch.bfloat16 and isa in ("amx_bf16", "avx512_bf16"):
        return "tdpbf16" if isa == "amx_bf16" else "vdpbf16"
    return "fma"


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    given = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*given).transpose(1, 2)


def error(got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    want, _ = reference(q[:, :CHECKED_ROWS], k, v)
    return ((got[:, :CHECKED_ROWS].double() - want).norm() / want.norm()).item()


def row(shape: tuple[torch.dtype, int, int, int], repeats: int) -> dict[str, Any]:
    dtype, head_dim, queries, keys = shape
    q, k, v = (torch.randn(1, n, HEADS, head_dim).to(dtype) for n in (queries, keys, keys))
    ops.reset_counts()
    ours = ops.attention(q, k, v)
    ((_, implementation),) = ops.counts()
    errors = error(ours, q, k, v), error(torch_attention(q, k, v), q, k, v)
    before = peaks()
    seconds = harness.compare(
        {"sdpa": lambda: torch_attention(q, k, v), "ours": lambda: ops.attention(q, k, v)}, repeats
    )
    after = peaks()
    work = 4 * HEADS * queries * keys * head_dim / 1e9
    used = instruction(dtype)
    limit = max(before[used], after[used]) * torch.get_num_threads()
    return {
        "shape": f"{str(dtype).removeprefix('torch.')} {queries}x{keys}x{head_dim}",
        "implementation": implementation,
        **{f"{name}_ms": value * 1e3 for name, value in seconds.items()},
        "vs_sdpa": seconds["sdpa"] / seconds["ours"],
        "GF/s": work / seconds["ours"],
        "instruction": used,
        "share": work / seconds["ours"] / limit if limit else 0.0,
        "error": errors[0],
        "sdpa_error": errors[1],
    }


def main() -> None:
    options = harness.arguments(__doc__)
    torch.set_num_threads(options.threads)
    harness.keep_freed_memory()
    with torch.inference_mode():
        rows = [row(shape, options.repeats) for shape in SHAPES]
    harness.report("attention", rows, save=options.save)


if __name__ == "__main__":
    main()
