"""The Triton kernels as torch ops (`torch.ops.sgld_triton.*`), imported on first use.

They run on a GPU, and on the CPU in Triton's interpreter (TRITON_INTERPRET=1), which is for tests:
fp32 and fp16 only, its bf16 is wrong.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ops import torch_impl

_NORM_MODULATE = (
    "norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, "
    "float eps, bool rms, ScalarType out_dtype) -> Tensor"
)


@functools.cache
def absent() -> str:
    """Why the Triton kernels cannot be used in this process, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run `pip install triton`"
    if importlib.util.find_spec("sgl_diffusion.kernels") is None:
        return "this checkout is not installed; run `pip install -e .`"
    return ""


def refuses(x: Tensor) -> str:
    """Why Triton cannot run on the device of x, or ""."""
    if x.device.type == "cuda":
        return ""
    from triton import knobs

    if not knobs.runtime.interpret:
        return "on the CPU Triton needs its interpreter (TRITON_INTERPRET=1)"
    return "its interpreter computes bfloat16 wrongly" if x.dtype == torch.bfloat16 else ""


@functools.cache
def _library() -> torch.library.Library:
    """The ops, registered once; it must stay referenced, or torch takes them back."""
    from sgl_diffusion.kernels.norm import norm_modulate_launch

    def fake(x: Tensor, *args: Any) -> Tensor:
        return x.new_empty(x.shape, dtype=args[-1])

    library = torch.library.Library("sgld_triton", "DEF")
    library.define(_NORM_MODULATE)
    for key in ("CUDA", "CPU"):
        library.impl("norm_modulate", norm_modulate_launch, key)
    torch.library.register_fake("sgld_triton::norm_modulate", fake, lib=library)
    return library


def norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out_dtype: torch.dtype,
) -> Tensor:
    _library()
    for part in (scale, shift):
        if part is not None:
            torch_impl.per_token(part, x)  # checks the shape
    return torch.ops.sgld_triton.norm_modulate.default(
        x, scale, shift, weight, bias, eps, kind == "rms", out_dtype
    )
