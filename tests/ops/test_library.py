"""The native library: loading, its absence, the CPU level, and how torch sees its ops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sgl_diffusion import ops
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.ops import OPS, library

needs_library = pytest.mark.skipif(bool(library.absent()), reason=library.absent() or "built")


@pytest.fixture
def _isa() -> Iterator[None]:
    yield
    library.restore_cpu_isa()


def test_every_op_has_a_public_function_and_a_reference() -> None:
    public = {name for name in ops.__all__ if name in OPS}
    assert public == set(OPS) and public
    refs = "".join(path.read_text() for path in (Path(__file__).parents[1] / "refs").glob("*.py"))
    for name in public:
        words = {"qk_norm_rope": "norm_rope", "lora_unmerge_": "lora_merge_"}.get(name, name)
        assert f"def {words}(" in refs, f"tests/refs has no reference of {name}"


def test_a_missing_library_is_a_reason_and_a_named_one_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, broken = tmp_path / "libsgld.so", tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    assert "not built; run `pip install -e .`" in library._load(missing)
    assert "cannot be loaded" in library._load(broken)
    monkeypatch.setenv("SGLD_LIBRARY", str(missing))
    assert library.path() == missing
    with pytest.raises(ConfigError, match="is not built"):
        library._load(missing)


def test_without_the_library_the_truth_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_absent", "it is not built")
    op = OPS.get("norm_modulate")
    op.forget()
    ops.reset_counts()
    ops.norm_modulate(torch.randn(2, 8))
    assert ops.counts() == {("norm_modulate", "torch"): 1}
    op.forget()


@needs_library
@pytest.mark.parametrize("level", ["avx2", "scalar"])
def test_the_environment_caps_the_cpu_level(
    level: str, _isa: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.ops.sgld.cap_cpu_isa(library.CPU_ISAS[0])
    best = torch.ops.sgld.cpu_isa()
    monkeypatch.setenv("SGLD_CPU_ISA", level)
    assert library._load(library.path()) == ""
    order = library.CPU_ISAS.index
    assert order(torch.ops.sgld.cpu_isa()) == max(order(level), order(best))


@needs_library
def test_an_unknown_cpu_level_is_an_error(_isa: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLD_CPU_ISA", "avx3")
    with pytest.raises(ConfigError, match="Did you mean 'avx2'"):
        library._load(library.path())
    with pytest.raises(ValueError, match="no CPU kernel level sse9"):
        torch.ops.sgld.cap_cpu_isa("sse9")


@needs_library
def test_torch_accepts_the_native_op() -> None:
    """Schema, fake implementation and tracing agree with what the op does."""
    x, rows = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 8)
    torch.library.opcheck(
        torch.ops.sgld.norm_modulate.default,
        (x, rows, rows, None, None, 1e-6, False, torch.float32),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@needs_library
def test_the_native_op_is_traced_without_running() -> None:
    x, rows = torch.randn(2, 3, 8), torch.randn(2, 8)
    with FakeTensorMode() as mode:
        fake = ops.norm_modulate(mode.from_tensor(x), mode.from_tensor(rows))
    assert fake.shape == x.shape and fake.dtype == x.dtype
    compiled = torch.compile(
        lambda x, rows: ops.norm_modulate(x.sin(), rows, rows).cos(),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x, rows), ops.norm_modulate(x.sin(), rows, rows).cos())


@needs_library
def test_other_devices_and_dtypes_are_errors_in_the_native_op() -> None:
    def call(x: torch.Tensor, scale: torch.Tensor | None) -> None:
        torch.ops.sgld.norm_modulate(x, scale, None, None, None, 1e-6, False, torch.float32)

    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        call(torch.zeros(2, 8, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="scale must be float32"):
        call(torch.zeros(2, 8), torch.zeros(8, dtype=torch.int32))
    with pytest.raises(ValueError, match="x has no dimension"):
        call(torch.zeros(()), None)
