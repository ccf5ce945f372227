"""Makes launch functions of Triton kernels into torch ops, so that torch.compile can trace them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sgl_diffusion.ops import triton_impl
from sgl_diffusion.ops.dispatch import Implementation


def register(*ops: tuple[str, Callable[..., Any], Callable[..., Any]]) -> torch.library.Library:
    """Defines `torch.ops.sgld_triton.*` from (schema, launch, fake).

    The result must stay referenced, or torch takes the ops back.
    """
    library = torch.library.Library("sgld_triton", "FRAGMENT")
    for schema, launch, fake in ops:
        name = schema.partition("(")[0]
        library.define(schema)
        for key in ("CUDA", "CPU"):
            library.impl(name, launch, key)
        torch.library.register_fake(f"sgld_triton::{name}", fake, lib=library)
    return library


def implementation(run: Callable[..., Any], refuses: Callable[..., str]) -> Implementation:
    """The row of a Triton kernel: on GPUs, and by name in the interpreter on the CPU."""
    return Implementation(
        "triton",
        run,
        ("cuda",),
        sm=range(80, 1000),
        named_devices=("cpu",),
        absent=triton_impl.absent,
        refuses=refuses,
    )
