"""What the CUDA kernels refuse, and their shapes for tracing; none of it needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sgl_diffusion.ops import cuda_attention, cuda_norms, library


def _heads(heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(2, 3, 3, heads, dim, dtype=dtype)[:, :, 1]


@pytest.mark.parametrize(
    ("heads", "dim", "norm", "refused"),
    [
        (24, 128, "head", ""),
        (40, 128, "full", ""),
        (3, 96, "full", ""),
        (3, 96, "head", "a norm over heads of 96"),
        (3, 40, "full", "heads 3 x 40"),
        (129, 128, "full", "heads 129 x 128"),
    ],
)
def test_rope_refuses_what_its_launch_cannot(heads: int, dim: int, norm: str, refused: str) -> None:
    q = _heads(heads, dim)
    rest: tuple[Any, ...] = (None, None, None, None, 1e-6, norm, "half")
    assert cuda_norms.refuses_rope(q, q, *rest) == refused


def test_rope_refuses_dtypes_and_alignment() -> None:
    q = _heads(2, 64)
    rest: tuple[Any, ...] = (None, None, None, None, 1e-6, "head", "half")
    assert "different dtypes" in cuda_norms.refuses_rope(q, q.float(), *rest)
    shifted = torch.zeros(2 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 1, 2, 64)
    assert "multiples of 16 bytes" in cuda_norms.refuses_rope(shifted, shifted, *rest)
    angle = torch.zeros(3, 32, dtype=torch.float64)
    rest = (None, None, angle, angle, 1e-6, "head", "half")
    assert "angles of torch.float64" in cuda_norms.refuses_rope(q, q, *rest)


def test_attention_refuses() -> None:
    q = _heads(2, 64)
    assert cuda_attention.refuses(q, q, q) == ""
    assert "torch.float16" in cuda_attention.refuses(q.half(), q, q)
    wide = _heads(2, 96)
    assert "head dim 96" in cuda_attention.refuses(wide, wide, wide)
    assert "not dense" in cuda_attention.refuses(q.transpose(2, 3), q, q)
    row = q[:1].expand(q.shape)
    assert cuda_attention.refuses(row, q, q) == ""
    assert cuda_attention.refuses_sm90(q, row, q) == "an expanded tensor"
    assert cuda_attention.refuses_sm90(q[:1].expand(1, -1, -1, -1), q, q) == ""


def test_shapes_while_tracing() -> None:
    if library.absent() or not torch.ops.sgld.has_cuda():
        pytest.skip(library.absent() or "built without nvcc")
    q, x, angle = _heads(2, 64), torch.zeros(2, 3, 40), torch.zeros(3, 32)
    with FakeTensorMode() as mode:
        q, x, angle = (mode.from_tensor(part) for part in (q, x, angle))
        for attention in (cuda_attention.attention, cuda_attention.attention_sm90):
            out, lse = attention(q, q, q)
            assert out.shape == q.shape and out.dtype == q.dtype
            assert lse.shape == (2, 2, 3) and lse.dtype == torch.float32
        rest = (None, None, angle, angle, 1e-6, "head", "half")
        assert [y.shape for y in cuda_norms.qk_norm_rope(q, q, *rest)] == [q.shape] * 2
        assert cuda_norms.qk_norm_rope(q, q, *rest, in_place=True) == (q, q)
        parts = (None, None, None, None, None, 1e-6, "rms")
        pair = cuda_norms.gate_residual_norm_modulate(x, x, *parts)
        assert [y.shape for y in pair] == [x.shape] * 2
        assert cuda_norms.gate_residual_norm_modulate(x, x, *parts, out=x)[0] is x
