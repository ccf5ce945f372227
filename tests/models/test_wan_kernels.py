"""The Wan transformer on every CPU level: the same outputs, and the kernels that made them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.models.wan import WanTransformer
from sgl_diffusion.ops import library
from tests.fixtures_wan import load_transformer
from tests.isa import at_level

pytestmark = pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")

# Ops of the model that have a CPU kernel, and their calls in a forward pass of n blocks.
CALLS = {
    "gate_residual": lambda n: n,
    "gate_residual_norm_modulate": lambda n: 2 * n,
    "gelu_tanh": lambda n: n,
    "norm_modulate": lambda n: 2 * n + 1,
    "qk_norm_rope": lambda n: n,
}


@pytest.fixture(params=library.CPU_ISAS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_level(request.param):
        yield request.param


@torch.no_grad()
def _forward(model: WanTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 3, 6, 4, generator=generator)
    context = model.prepare(torch.randn(2, 20, 32, generator=generator))
    ops.reset_counts()
    return model(latents, torch.tensor([999.0, 21.0]), context).float()


@pytest.mark.parametrize("folder", ["tiny_wan_a", "tiny_wan_b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_level_computes_what_torch_does(
    level: str, folder: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(folder)
    with ops.using(**dict.fromkeys(CALLS, "torch")):
        want = _forward(load_transformer(path))
        by_torch = _forward(load_transformer(path, dtype))
        assert all(name == "torch" for op, name in ops.counts() if op in CALLS)
    model = load_transformer(path, dtype)
    got = _forward(model)
    counts = {op: n for (op, name), n in ops.counts().items() if name == "cpu"}
    assert counts == {op: calls(len(model.blocks)) for op, calls in CALLS.items()}
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    else:
        error, torch_error = ((x - want).norm() / want.norm() for x in (got, by_torch))
        assert error <= 1.15 * torch_error


def test_a_block_leaves_its_input_alone(tiny_wan_a: Path) -> None:
    """It updates its own residual in place, not the one it was given."""
    model = load_transformer(tiny_wan_a)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.blocks[1].register_forward_pre_hook(
        lambda block, args: seen.append((args[0], args[0].clone()))
    )
    _forward(model)
    hook.remove()
    ((given, before),) = seen
    assert torch.equal(given, before)
