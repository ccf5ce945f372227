"""linear: y = x Wᵀ + b, on the CPU through oneDNN where that is faster."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sgl_diffusion.ops.dispatch import Implementation, Op


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.sgl_diffusion.linear_onednn.default(x, weight, bias)
    # On the plain weights: packed ones would be faster still, but not see an update in place.
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


# torch.compile takes that op for one of its own, on weights that it has packed.
@torch.library.custom_op(
    "sgl_diffusion::linear_onednn",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn(x, weight, bias)


@_opaque.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _absent() -> str:
    return "" if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"


def _absent_bf16() -> str:
    supported = not _absent() and torch.ops.mkldnn._is_mkldnn_bf16_supported.default()
    return _absent() or ("" if supported else "this CPU has no bf16 instructions that oneDNN uses")


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return f"weights of {weight.dtype}"
    return "" if x.ndim > 1 and x.numel() > 0 else f"an input {tuple(x.shape)}"


@functools.cache
def mkl_is_slow() -> bool:
    """Whether torch multiplies fp32 matrices with MKL on a CPU that MKL was not made for.

    On an Intel CPU oneDNN gains nothing, see docs/measured.md.
    """
    try:
        with Path("/proc/cpuinfo").open() as file:
            vendor = next((line for line in file if line.startswith("vendor_id")), "")
    except OSError:
        vendor = ""
    return torch.backends.mkl.is_available() and "AuthenticAMD" in vendor


_linear = Op(
    "linear",
    functional.linear,
    Implementation(
        "onednn",
        _onednn,
        devices=("cpu",) if mkl_is_slow() else (),
        named_devices=("cpu",),
        dtypes=(torch.float32,),
        absent=_absent,
        refuses=_refuses,
    ),
    # The same bits as torch, which fills the result with the bias before it multiplies.
    Implementation(
        "onednn_bf16",
        _onednn,
        devices=("cpu",),
        dtypes=(torch.bfloat16,),
        absent=_absent_bf16,
        refuses=_refuses,
    ),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias [out]."""
    return _linear(x, weight, bias)
