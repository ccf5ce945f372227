"""How large weights will be in memory, from the headers of their files alone, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sgl_diffusion.loader.files import damaged, weight_files
from sgl_diffusion.loader.index import Component


def weight_count(part: Component) -> int:
    """Numbers in the weights of a component."""
    source = part.weights
    files = [source] if source.is_file() else weight_files(source, part.variant)
    return sum(count for _, count in counts_of(files))


def counts_of(files: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """Every tensor of some files by its key, and how many numbers it has."""
    for file in files:
        try:
            with safe_open(file, framework="np") as handle:
                for key in handle.keys():
                    yield key, math.prod(handle.get_slice(key).get_shape())
        except (SafetensorError, OSError):
            raise damaged(file) from None
