"""Triton's interpreter, made to work with the NumPy that is installed; imported by its tests."""

from __future__ import annotations

from typing import Any

from triton import knobs
from triton.runtime import interpreter

assert knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes a loop bound of an array of one element, which NumPy 2.4 refuses."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
