"""Attention backends against an fp64 reference, and the choice between them."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgl_diffusion.attention import BACKENDS, AttentionContext, select
from sgl_diffusion.attention.flash import FlashBackend, _library
from sgl_diffusion.attention.sdpa import SdpaBackend
from sgl_diffusion.base.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# batch, queries, keys, heads, head dim
SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 7, 7, 3, 16),
    (1, 33, 512, 4, 64),
    (3, 130, 5, 2, 128),
    (2, 65, 65, 1, 24),
]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention in fp64, [B, S, H, d]."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bshd,blhd->bhsl", q, k) * (scale or q.shape[-1] ** -0.5)
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    b, s, length, h, d = shape
    generator = torch.Generator().manual_seed(s)
    sizes = [(b, s, h, d), (b, length, h, d), (b, length, h, d)]
    q, k, v = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return q, k, v


def runnable(name: str, head_dim: int, dtype: torch.dtype) -> bool:
    return BACKENDS.get(name).supports(CPU, head_dim, dtype, False) is None


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = draw(shape, dtype)
    tested = [name for name in BACKENDS if runnable(name, shape[-1], dtype)]
    assert "sdpa" in tested
    for name in tested:
        for scale in (None, 0.3):
            out = BACKENDS.get(name).forward(q, k, v, scale=scale)
            assert out.shape == q.shape and out.dtype == dtype
            error = (out.double() - reference(q, k, v, scale)).abs().max()
            assert float(error) < BOUNDS[dtype], name


def test_inputs_may_be_views_of_one_tensor() -> None:
    fused = torch.randn(2, 9, 3, 4, 16)
    q, k, v = fused.unbind(2)
    out = SdpaBackend().forward(q, k, v)
    torch.testing.assert_close(out.double(), reference(q, k, v), atol=2e-6, rtol=0)


def test_one_rank_uses_the_backend_for_everything() -> None:
    q, k, v = draw((1, 5, 7, 2, 8), torch.float32)
    context = AttentionContext.on_one_rank(SdpaBackend())
    assert torch.equal(context.tokens(q, k, v), context.local(q, k, v))


def test_auto_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sgl_diffusion.attention.select"):
        backend = select("auto", device=CPU, head_dim=64, dtype=torch.float32)
    assert backend.name == "sdpa"
    (record,) = caplog.records
    assert record.getMessage() == "attention backend sdpa; not flash: it runs on cuda, not on cpu"


def test_a_named_backend_works_or_raises() -> None:
    assert select("sdpa", device=CPU, head_dim=8, dtype=torch.float32).name == "sdpa"
    with pytest.raises(ConfigError, match="flash: it runs on cuda, not on cpu"):
        select("flash", device=CPU, head_dim=64, dtype=torch.bfloat16)


def test_nobody_can() -> None:
    with pytest.raises(ConfigError, match="sdpa: it gives no log-sum-exp"):
        select("auto", device=CPU, head_dim=64, dtype=torch.float32, needs_lse=True)


def test_a_wrong_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        select("falsh", device=CPU, head_dim=64, dtype=torch.float32)
    assert caught.value.hint == "Did you mean 'flash'?"


@pytest.mark.parametrize(
    ("head_dim", "dtype", "word"),
    [(64, torch.float32, "float32"), (512, torch.float16, "512"), (20, torch.bfloat16, "20")],
)
def test_flash_names_what_it_cannot_do(head_dim: int, dtype: torch.dtype, word: str) -> None:
    reason = FlashBackend().supports(CUDA, head_dim, dtype, False)
    assert reason is not None and word in reason


def test_a_broken_flash_library_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    _library.cache_clear()
    with caplog.at_level(logging.INFO, "sgl_diffusion.attention.select"):
        backend = select("auto", device=CUDA, head_dim=64, dtype=torch.bfloat16)
    assert backend.name == "sdpa" and "cannot be imported" in caplog.text


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed"
)
def test_flash_says_that_it_is_not_installed() -> None:
    reason = FlashBackend().supports(CUDA, 128, torch.bfloat16, False)
    assert reason is not None and "pip install flash-attn" in reason
