"""Ids of videos and images: a prefix, the time, and chance; they sort by age."""

from __future__ import annotations

import re
import secrets
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ID = re.compile(r"(video|image)_[0-9A-Za-z]{10,64}", re.ASCII)


def new_id(prefix: str) -> str:
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    digits = [_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5)]
    return f"{prefix}_{''.join(digits)}"


def is_id(text: str, prefix: str) -> bool:
    """Checked before an id from outside becomes part of a path or a query."""
    return text.startswith(prefix + "_") and _ID.fullmatch(text) is not None
