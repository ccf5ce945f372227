"""Rank 2: attention. Backends compute it on one device; strategies will spread it over ranks."""

from __future__ import annotations

from sgl_diffusion.attention.base import (
    Attend,
    AttendPacked,
    AttendRepeated,
    AttentionBackend,
    AttentionContext,
    LseBackend,
)
from sgl_diffusion.attention.packed import RowLengths
from sgl_diffusion.attention.select import AUTO, BACKENDS, select

__all__ = [
    "AUTO",
    "BACKENDS",
    "Attend",
    "AttendPacked",
    "AttendRepeated",
    "AttentionBackend",
    "AttentionContext",
    "LseBackend",
    "RowLengths",
    "select",
]
