"""What is counted without numbers is what the allocator reports when it is done with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sgl_diffusion import ops
from sgl_diffusion.components.conv3d import use_onednn
from sgl_diffusion.engine.footprint.counting import Counting
from sgl_diffusion.layers.embed import rope_tables
from tests.engine.footprint.recorded import recording

CPU = torch.device("cpu")


def counted(work: Callable[[], object]) -> tuple[int, int]:
    with Counting().of() as count:
        kept = work()
        found = count.peak, count.left
    del kept
    return found


def recorded(work: Callable[[], object]) -> tuple[int, int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # with one thread torch computes small products in other ways
    try:
        return _recorded(work)
    finally:
        torch.set_num_threads(before)


def _recorded(work: Callable[[], object]) -> tuple[int, int]:
    with torch.inference_mode():
        work()  # what libraries take once
        with recording() as found:
            kept = work()
    del kept
    return found.peak, found.left


def test_blocks_are_counted_until_the_last_tensor_is_gone() -> None:
    with Counting().of() as count:
        x = torch.zeros(1000)
        part = x[:10]
        assert (count.left, count.peak) == (4000, 4000)
        del x
        assert count.left == 4000
        y = part.clone()
        del part
        assert (count.left, count.peak) == (y.nbytes, 4000 + y.nbytes)


def test_what_was_there_before_is_not_counted() -> None:
    weight = torch.zeros(64, 64)
    with Counting().of() as count:
        y = functional.linear(torch.zeros(2, 64), weight)
        assert count.left == y.nbytes
        view = weight.t()[:3]
        assert count.left == y.nbytes and view.shape == (3, 64)


def test_tables_for_later_jobs_stay_real() -> None:
    with Counting().of():
        assert rope_tables((1, 4, 4), (4, 6, 6), CPU)[0].shape == (16, 8)
    assert float(rope_tables((1, 4, 4), (4, 6, 6), CPU)[0][0, 0]) == 1.0


def test_attention_takes_its_result() -> None:
    q = torch.zeros(1, 8, 512, 64)
    peak, left = counted(lambda: functional.scaled_dot_product_attention(q, q, q))
    assert peak == left == q.nbytes


WORKS: dict[str, Callable[[], Callable[[], Tensor]]] = {}


def work(make: Callable[[], Callable[[], Tensor]]) -> Callable[[], Callable[[], Tensor]]:
    WORKS[make.__name__] = make
    return make


@work
def convolution_of_pictures() -> Callable[[], Tensor]:
    conv, x = nn.Conv2d(64, 128, 3, padding=1), torch.randn(1, 64, 96, 96)
    return lambda: conv(x)


@work
def convolution_of_few_channels() -> Callable[[], Tensor]:
    conv, x = nn.Conv2d(48, 24, 3, padding=1), torch.randn(1, 48, 96, 96)
    return lambda: conv(x)


@work
def pointwise_convolution() -> Callable[[], Tensor]:
    conv, x = nn.Conv2d(64, 64, 1), torch.randn(1, 64, 96, 96)
    return lambda: conv(x)


@work
def strided_convolution() -> Callable[[], Tensor]:
    conv, x = nn.Conv2d(64, 64, 3, stride=2), torch.randn(1, 64, 97, 97)
    return lambda: conv(x)


@work
def convolution_of_clips() -> Callable[[], Tensor]:
    conv, x = nn.Conv3d(64, 64, 3), torch.randn(1, 64, 6, 66, 66)
    use_onednn(nn.Sequential(conv))
    return lambda: conv(x)


@work
def convolution_in_halves() -> Callable[[], Tensor]:
    conv, x = nn.Conv2d(64, 128, 3, padding=1).bfloat16(), torch.randn(1, 64, 96, 96).bfloat16()
    return lambda: conv(x)


@work
def group_norm() -> Callable[[], Tensor]:
    norm, x = nn.GroupNorm(32, 64), torch.randn(1, 64, 96, 96)
    return lambda: functional.silu(norm(x))


@work
def upsampling() -> Callable[[], Tensor]:
    x = torch.randn(1, 64, 96, 96)
    return lambda: functional.interpolate(x, scale_factor=2.0, mode="nearest")


@work
def perceptron() -> Callable[[], Tensor]:
    up, down = torch.randn(1024, 256), torch.randn(256, 1024)
    x = torch.randn(1, 2048, 256)
    return lambda: ops.linear(ops.gelu_tanh(ops.linear(x, up)), down)


@work
def perceptron_in_halves() -> Callable[[], Tensor]:
    up, down = torch.randn(1024, 256).bfloat16(), torch.randn(256, 1024).bfloat16()
    x = torch.randn(1, 2048, 256).bfloat16()
    return lambda: ops.linear(ops.gelu_tanh(ops.linear(x, up)), down)


@work
def modulated_norm() -> Callable[[], Tensor]:
    x, scale = torch.randn(2, 2048, 256), torch.randn(2, 256)
    return lambda: ops.norm_modulate(x, scale, scale)


@work
def attention() -> Callable[[], Tensor]:
    q = torch.randn(1, 2048, 8, 64)
    return lambda: ops.attention(q, q, q)


# A CPU that multiplies halves in tiles (AMX) makes one copy more than others, and that is counted.
MOST = {"convolution_in_halves": 1.5}


@pytest.mark.parametrize("name", sorted(WORKS))
def test_the_allocator_reports_what_was_counted(name: str) -> None:
    piece = WORKS[name]()
    peak, left = counted(piece)
    real_peak, real_left = recorded(piece)
    assert left == real_left
    assert 0.9 * real_peak <= peak <= 1.1 * MOST.get(name, 1.0) * real_peak
