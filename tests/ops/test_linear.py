"""linear through torch and through oneDNN on plain weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sgl_diffusion import ops
from sgl_diffusion.ops.linear import _absent, _absent_bf16, mkl_is_slow
from tests.refs.linear import linear as reference

onednn = pytest.param("onednn", marks=pytest.mark.skipif(bool(_absent()), reason=_absent() or "-"))


@pytest.mark.parametrize("by", ["torch", onednn])
def test_values(by: str) -> None:
    for shape in ((1, 1), (5, 7), (2, 33, 40), (2, 3, 4, 64)):
        for outputs in (1, 24):
            x, weight = torch.randn(shape), torch.randn(outputs, shape[-1])
            for bias in (None, torch.randn(outputs)):
                with ops.using(linear=by):
                    got = ops.linear(x, weight, bias)
                torch.testing.assert_close(
                    got.double(), reference(x, weight, bias), rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("by", ["torch", onednn])
def test_strided_inputs(by: str) -> None:
    x, weight = torch.randn(3, 5, 96)[..., 48:], torch.randn(60, 48)[::2]
    with ops.using(linear=by):
        got = ops.linear(x, weight)
    torch.testing.assert_close(got.double(), reference(x, weight, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["torch", onednn])
def test_a_weight_changed_in_place_is_seen(by: str) -> None:
    """Adapters are merged into the weights in place: nothing may keep a copy of them."""
    x, weight, bias = torch.randn(64, 128), torch.randn(256, 128), torch.randn(256)
    with torch.inference_mode(), ops.using(linear=by):
        before = ops.linear(x, weight, bias)
        weight[17] += 1.0
        bias[3] -= 2.0
        after = ops.linear(x, weight, bias)
    torch.testing.assert_close(after.double(), reference(x, weight, bias), rtol=1e-5, atol=1e-4)
    changed = (after != before).any(0).nonzero().flatten().tolist()
    assert changed == [3, 17]


def test_the_choice_is_onednn_in_bf16_and_in_fp32_where_mkl_is_slow() -> None:
    ops.reset_counts()
    ops.linear(torch.randn(2, 8), torch.randn(4, 8))
    chosen = "onednn" if mkl_is_slow() and not _absent() else "torch"
    assert ops.counts() == {("linear", chosen): 1}
    ops.reset_counts()
    ops.linear(torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16())
    assert ops.counts() == {("linear", "torch" if _absent_bf16() else "onednn_bf16"): 1}


@pytest.mark.skipif(bool(_absent_bf16()), reason=_absent_bf16() or "-")
def test_onednn_gives_the_bits_of_torch_in_bf16() -> None:
    for shape in ((3, 40), (2, 33, 64), (2, 130, 192)):
        x, weight = torch.randn(shape).bfloat16(), torch.randn(96, shape[-1]).bfloat16()
        for bias in (None, torch.randn(96).bfloat16()):
            results = {}
            for by in ("torch", "onednn_bf16"):
                with ops.using(linear=by):
                    results[by] = ops.linear(x, weight, bias)
            error = (results["onednn_bf16"].double() - reference(x, weight, bias)).norm()
            assert error < 0.004 * reference(x, weight, bias).norm()
            assert torch.equal(results["torch"], results["onednn_bf16"])
    weight[5] += 1.0
    assert not torch.equal(ops.linear(x, weight, bias), results["torch"])


@pytest.mark.skipif(bool(_absent_bf16()), reason=_absent_bf16() or "-")
def test_a_compiled_product_stays_one_node() -> None:
    """torch.compile replaces oneDNN's own op by one that wants packed weights."""
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((2, 33, 64), (96, 64), (96,)))
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda x: ops.linear(x, weight, bias), fullgraph=True, backend=look)
    assert torch.equal(compiled(x), ops.linear(x, weight, bias))
    assert seen == ["sgl_diffusion.linear_onednn.default"]
    torch.library.opcheck(torch.ops.sgl_diffusion.linear_onednn.default, (x, weight, bias))
