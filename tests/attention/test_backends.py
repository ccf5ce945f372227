"""Attention backends against an fp64 reference, and the choice between them."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.attention import BACKENDS, AttentionContext, RowLengths, select
from sgl_diffusion.attention.flash import FlashBackend, _library
from sgl_diffusion.attention.native import NativeBackend
from sgl_diffusion.attention.sdpa import SdpaBackend
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.ops import library
from sgl_diffusion.ops.validated import VALIDATED
from tests.isa import at_level
from tests.refs.attention import attention as reference

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


needs_library = pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")


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
    assert "sdpa" in tested and ("native" in tested) == (not library.absent())
    for name in tested:
        for scale in (None, 0.3):
            out = BACKENDS.get(name).forward(q, k, v, scale=scale)
            assert out.shape == q.shape and out.dtype == dtype
            error = (out.double() - reference(q, k, v, scale=scale)[0]).abs().max()
            assert float(error) < BOUNDS[dtype], name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rows_of_different_lengths_attend_within_themselves(dtype: torch.dtype) -> None:
    """Queries as keys, and others: with the choice of "auto", which leaves short rows to sdpa."""
    lengths = RowLengths((5, 140, 1), (9, 70, 33))
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(sum(each), 2, 64, generator=generator).to(dtype)
        for each in (lengths.queries, lengths.keys, lengths.keys)
    )
    rows = zip(
        q.split(list(lengths.queries)),
        k.split(list(lengths.keys)),
        v.split(list(lengths.keys)),
        strict=True,
    )
    expected = torch.cat([reference(*(x[None] for x in row))[0][0] for row in rows])
    backends = [BACKENDS.get(name) for name in BACKENDS if runnable(name, 64, dtype)]
    for backend in [*backends, select("auto", device=CPU, head_dim=64, dtype=dtype)]:
        out = backend.forward_packed(q, k, v, lengths)
        assert out.shape == q.shape and out.dtype == dtype
        assert float((out.double() - expected).abs().max()) < BOUNDS[dtype], backend.name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("queries", [7, 140])
def test_a_key_may_stand_for_several(queries: int, dtype: torch.dtype) -> None:
    q, k, v = draw((2, queries, 9, 3, 64), dtype)
    counts = torch.ones(2, 9)
    counts[0, 8], counts[1, 2], counts[1, 5] = 504, 40, 3
    every = [BACKENDS.get(name) for name in BACKENDS]
    backends = [backend for backend in every if backend.repeated(CPU) is not None]
    assert backends == [BACKENDS.get("sdpa")] and backends[0].repeated(CUDA) is None
    for backend in (*backends, select("auto", device=CPU, head_dim=64, dtype=dtype)):
        attend = backend.repeated(CPU)
        assert attend is not None
        out = attend(q, k, v, counts.log(), scale=0.3)
        assert out.shape == q.shape and out.dtype == dtype
        for row, times in enumerate(counts.long()):
            one = slice(row, row + 1)
            keys, values = (x[one].repeat_interleave(times, dim=1) for x in (k, v))
            expected = reference(q[one], keys, values, scale=0.3)[0]
            assert float((out[one].double() - expected).abs().max()) < BOUNDS[dtype], backend.name


def test_inputs_may_be_views_of_one_tensor() -> None:
    fused = torch.randn(2, 9, 3, 4, 16)
    q, k, v = fused.unbind(2)
    out = SdpaBackend().forward(q, k, v)
    torch.testing.assert_close(out.double(), reference(q, k, v)[0], atol=2e-6, rtol=0)


def test_one_rank_uses_the_backend_for_everything() -> None:
    q, k, v = draw((1, 5, 7, 2, 8), torch.float32)
    context = AttentionContext.on_one_rank(SdpaBackend())
    assert torch.equal(context.tokens(q, k, v), context.local(q, k, v))


def test_auto_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sgl_diffusion.attention.select"):
        backend = select("auto", device=CPU, head_dim=64, dtype=torch.float64)
    assert backend.name == "sdpa"
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention backend sdpa; not flash: it runs on cuda, not on cpu; "
        "not native: it computes in fp32, bf16 and fp16, not in float64; "
        "not triton: it runs on cuda, not on cpu"
    )


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_auto_takes_the_native_kernel(head_dim: int, dtype: torch.dtype) -> None:
    if NativeBackend().slower(CPU, dtype):
        pytest.skip("native is not chosen at this level")
    backend = select("auto", device=CPU, head_dim=head_dim, dtype=dtype)
    assert backend.name == "native"
    ops.reset_counts()
    backend.forward(*draw((1, 130, 9, 2, head_dim), dtype))
    assert ops.counts() == {("attention", "cpu"): 1}


@needs_library
def test_auto_passes_over_the_scalar_kernels_unless_they_alone_can() -> None:
    with at_level("scalar"):
        case = {"device": CPU, "head_dim": 64, "dtype": torch.float32}
        assert select("auto", **case).name == "sdpa"
        assert select("native", **case).name == "native"
        assert select("auto", needs_lse=True, **case).name == "native"


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_leaves_short_calls_to_sdpa(dtype: torch.dtype) -> None:
    native = NativeBackend()
    if native.slower(CPU, dtype):
        pytest.skip("native is not chosen at all here")
    least = native.least_queries(CPU, dtype)
    backend = select("auto", device=CPU, head_dim=64, dtype=dtype)
    for queries, calls in ((least - 1, {}), (least, {("attention", "cpu"): 1})):
        q, k, v = draw((1, queries, 9, 2, 64), dtype)
        ops.reset_counts()
        out = backend.forward(q, k, v, scale=0.2)
        assert ops.counts() == calls
        assert (out.double() - reference(q, k, v, scale=0.2)[0]).abs().max() < BOUNDS[dtype]
    named = select("native", device=CPU, head_dim=64, dtype=dtype)
    named.forward(*draw((1, 1, 9, 2, 64), dtype))
    assert ops.counts() == {("attention", "cpu"): 2}, "a named backend takes every call"


@needs_library
def test_auto_takes_the_tiles_of_torch_where_ours_are_capped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with at_level("avx2"):
        case = {"device": CPU, "head_dim": 64}
        for tiles, name in ((True, "sdpa"), (False, "native")):
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
            assert select("auto", dtype=torch.bfloat16, **case).name == name
            assert select("auto", dtype=torch.float32, **case).name == "native"


@needs_library
def test_native_gives_the_log_sum_exp() -> None:
    q, k, v = draw((2, 7, 19, 3, 64), torch.bfloat16)
    out, lse = NativeBackend().forward_lse(q, k, v, scale=0.2)
    assert torch.equal(out, NativeBackend().forward(q, k, v, scale=0.2))
    want = reference(q, k, v, scale=0.2)[1]
    torch.testing.assert_close(lse.double(), want, rtol=1e-5, atol=1e-5)


def test_native_names_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: torch.device, head_dim: int) -> str:
        return NativeBackend().supports(device, head_dim, torch.float32, True) or ""

    assert "not in float32" in reason(CUDA, 64) and "head dim 20" in reason(CPU, 20)
    assert "head dim 96 is not 64 or 128" in reason(CUDA, 96)
    assert "cpu and cuda, not on meta" in reason(torch.device("meta"), 64)
    monkeypatch.setattr(library, "_absent", "it is not built")
    assert reason(CPU, 64) == "it is not built"


def test_a_named_backend_works_or_raises() -> None:
    assert select("sdpa", device=CPU, head_dim=8, dtype=torch.float32).name == "sdpa"
    with pytest.raises(ConfigError, match="flash: it runs on cuda, not on cpu"):
        select("flash", device=CPU, head_dim=64, dtype=torch.bfloat16)


def test_nobody_can() -> None:
    with pytest.raises(ConfigError, match="sdpa: it gives no log-sum-exp"):
        select("auto", device=CPU, head_dim=20, dtype=torch.float32, needs_lse=True)


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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO, "sgl_diffusion.attention.select"):
        backend = select("auto", device=CUDA, head_dim=64, dtype=torch.bfloat16)
    assert backend.name == "sdpa" and "cannot be imported" in caplog.text


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_gpu_kernel_that_was_never_validated_runs_only_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = BACKENDS.get(name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    absent = backend.supports(CUDA, 64, torch.bfloat16, True)
    if absent:
        pytest.skip(absent)
    case = {"device": CUDA, "head_dim": 64, "dtype": torch.bfloat16, "needs_lse": True}
    assert select(name, **case).name == name
    with pytest.raises(ConfigError, match=f"{name}: it was never validated on sm_90"):
        select("auto", **case)
    monkeypatch.setitem(VALIDATED, ("attention", backend.rows[-1], "sm_90"), "a file")
    assert select("auto", **case).name == name


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed"
)
def test_flash_says_that_it_is_not_installed() -> None:
    reason = FlashBackend().supports(CUDA, 128, torch.bfloat16, False)
    assert reason is not None and "pip install flash-attn" in reason
