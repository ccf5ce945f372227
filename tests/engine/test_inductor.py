"""Generated code that writes into parts of a tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.engine.inductor import lower_storage_offsets
from sgl_diffusion.ops import library


@pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")
@pytest.mark.filterwarnings("default")  # a compiler has its own
def test_an_op_writes_into_the_part_it_is_given_where_sizes_are_open() -> None:
    """No more than products and ops, so that no C++ compiler has to run."""
    from torch._inductor.utils import fresh_cache

    def corner(first: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight
        part = y[len(first) :, :4]
        ops.gelu_tanh(part, out=part)
        return y

    lower_storage_offsets()
    lower_storage_offsets()  # of two models in a process
    torch._dynamo.reset()
    with fresh_cache(), torch.inference_mode():
        compiled = torch.compile(corner, dynamic=True, fullgraph=True)
        for first, size in ((3, 7), (5, 11)):
            given = torch.randn(first), torch.randn(size, 8), torch.randn(8, 8)
            assert torch.equal(compiled(*given), corner(*given))
