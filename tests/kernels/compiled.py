"""Compiles a Triton kernel for a GPU that need not be there, as its launch function would."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ABSENT = "constexpr"


def compile_for(
    sm: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    unaligned: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """`types` of the arguments that are no i32; an argument in `unaligned` may have any value.

    The other pointers and integers are multiples of 16, which a launch finds out by itself.
    """
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = ABSENT if name in constants else types.get(name, "i32")
        if signature[name] not in (ABSENT, "fp32") and name not in unaligned:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def spills(compiled: Any) -> bool:
    """Whether registers went to local memory."""
    return bool(re.search(r"\b(LDL|STL)\b", compiled.asm["sass"]))
