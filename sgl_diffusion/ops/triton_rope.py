"""qk_norm_rope by Triton, with the arguments of the torch truth."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sgl_diffusion.ops import triton_impl
from sgl_diffusion.ops.dispatch import FLOATS
from sgl_diffusion.ops.triton_register import register


@functools.cache
def _library() -> torch.library.Library:
    from sgl_diffusion.kernels.qk_norm_rope import qk_norm_rope_launch

    def fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape)

    parts = "Tensor? weight_q, Tensor? weight_k, Tensor? cos, Tensor? sin, float eps, "
    flags = "bool full, bool interleaved"

    def in_place(q: Tensor, k: Tensor, *rest: object) -> None:
        qk_norm_rope_launch(q, k, *rest, in_place=True)

    return register(
        (
            f"qk_norm_rope(Tensor q, Tensor k, {parts}{flags}) -> (Tensor, Tensor)",
            qk_norm_rope_launch,
            fake,
        ),
        (
            f"qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, {parts}{flags}) -> ()",
            in_place,
            lambda *_: None,
        ),
    )


def refuses(q: Tensor, k: Tensor, *rest: object) -> str:
    for part in (k, *rest):
        if isinstance(part, Tensor) and part.dtype not in FLOATS:
            return f"a tensor of {part.dtype}"
    if q.dtype != k.dtype:
        return "q and k of different dtypes"
    if q.shape[3] % 2:
        return f"an odd head dim {q.shape[3]}"
    return triton_impl.refuses(q)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    rotary: str,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """New tensors, or in place: then q and k have dense heads, as views of one QKV output have."""
    _library()
    rest = (weight_q, weight_k, cos, sin, eps, norm == "full", rotary == "interleaved")
    if in_place:
        torch.ops.sgld_triton.qk_norm_rope_.default(q, k, *rest)
        return q, k
    out: tuple[Tensor, Tensor] = torch.ops.sgld_triton.qk_norm_rope.default(q, k, *rest)
    return out
