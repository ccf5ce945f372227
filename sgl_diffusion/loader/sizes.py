"""How large weights will be in memory, from the headers of their files alone."""

from __future__ import annotations

import math

from safetensors import SafetensorError, safe_open

from sgl_diffusion.loader.files import damaged, weight_files
from sgl_diffusion.loader.index import Component


def weight_count(part: Component) -> int:
    """Numbers in the weights of a component."""
    source = part.weights
    files = [source] if source.is_file() else weight_files(source, part.variant)
    count = 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                keys = handle.keys()
                count += sum(math.prod(handle.get_slice(key).get_shape()) for key in keys)
        except (SafetensorError, OSError):
            raise damaged(file) from None
    return count
