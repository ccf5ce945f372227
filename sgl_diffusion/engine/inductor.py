"""What torch's Inductor needs to generate right code for blocks that are written in place."""

from __future__ import annotations

from typing import Any

import torch

# Part of the keys under which generated code is kept on disk, so that none is found there that
# was made without the lowering below.
CACHE_TAG = "sgl_diffusion-1"


def lower_storage_offsets() -> None:
    """Have Inductor take the storage offset of a view from what was traced.

    torch 2.13 has no lowering of `aten.sym_storage_offset`. It then asks a stand-in of the view,
    which begins at zero. With sizes open that is the offset of every view that an op writes into:
    the second of two parts of a tensor is written where the first one is, and nothing is said.
    """
    from torch._inductor.lowering import fallbacks, lowerings, register_lowering
    from torch._inductor.virtualized import V

    offset = torch.ops.aten.sym_storage_offset.default
    if offset in lowerings and offset not in fallbacks:
        return

    def traced(view: Any) -> Any:
        value = V.graph.current_node.meta["val"]
        return value.node.expr if isinstance(value, torch.SymInt) else int(value)

    register_lowering(offset)(traced)
    fallbacks.discard(offset)
