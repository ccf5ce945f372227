"""What merging into 16-bit weights costs beside applying the same adapter to rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgl_diffusion import ops
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.engine.lora.checks import pick_mode
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.ops import LoraDelta

# |update| / |weight|, rms: what merging may lose of a bf16 layer's output, and of the adapter's
# part. docs/lora.md has both columns.
LOSSES = {0.57: (0.0020, 0.004), 0.08: (0.0018, 0.022), 0.01: (0.0018, 0.18)}


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("ratio", LOSSES)
def test_what_a_bf16_merge_loses(ratio: float) -> None:
    torch.manual_seed(0)
    out, width, rank = 384, 512, 16
    base = (0.02 * torch.randn(out, width)).bfloat16()
    down = (torch.randn(rank, width) / width**0.5).bfloat16()
    up = (torch.randn(out, rank) * 0.02 * ratio * (width / rank) ** 0.5).bfloat16()
    delta = LoraDelta(down, up)
    x = torch.randn(256, width).bfloat16()
    part = x.double() @ (up.double() @ down.double()).T
    want = x.double() @ base.double().T + part
    merged = base.clone()
    ops.lora_merge_([merged], [[delta]])
    # Without the rounding of the output, which both have.
    lost = x.double() @ merged.double().T - want
    of_output, of_part = LOSSES[ratio]
    assert float(lost.norm() / want.norm()) < of_output
    assert 0.5 * of_part < float(lost.norm() / part.norm()) < of_part
    # Applied to rows it is right to the rounding of the output: fp32 in between.
    y = (x.double() @ base.double().T).float()
    applied = ops.lora_apply(x, y, [[delta]])
    assert _distance(applied, want) < 2.0**-14
    rounded = _distance(want.bfloat16(), want)
    assert _distance(ops.lora_apply(x, y.bfloat16(), [[delta]]), want) < 2.5 * rounded


def test_auto_merges_into_16_bits_and_more_only() -> None:
    def components(dtype: torch.dtype) -> dict[str, Adaptable]:
        module = nn.Linear(4, 4).requires_grad_(False)
        module.weight.data = module.weight.to(dtype)
        return {"transformer": Adaptable(module, Rules(), "")}

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert pick_mode("auto", [], components(dtype)) == "merged"
    assert pick_mode("auto", [], components(torch.float8_e4m3fn)) == "dynamic"
    with pytest.raises(RequestError, match="float8_e4m3fn"):
        pick_mode("merge", [], components(torch.float8_e4m3fn))
