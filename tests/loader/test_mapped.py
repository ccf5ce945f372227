"""Weights that are pages of their file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.layers.linear import Linear
from sgl_diffusion.loader.header import read_header
from sgl_diffusion.loader.mapped import map_tensor
from sgl_diffusion.loader.rules import Rule, Rules
from sgl_diffusion.loader.stored import stored_tensors
from sgl_diffusion.loader.weights import load_weights

HALF, FULL = torch.bfloat16, torch.float32
RULES = Rules(*(Rule(f"attn.to_{name}", "qkv", segment=name) for name in "qkv"))


class Net(nn.Module):
    KEEP_FP32 = ("norm",)

    def __init__(self) -> None:
        super().__init__()
        self.qkv = Linear(1024, {"q": 512, "k": 512, "v": 512})
        self.out = Linear(1024, 1024)
        self.norm = nn.LayerNorm(1024)


def net() -> Net:
    with torch.device("meta"):
        return Net()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """In the page cache, as it was just written."""
    half = {"out.weight": torch.randn(1024, 1024), "out.bias": torch.randn(1024)}
    for name in "qkv":
        half |= {
            f"attn.to_{name}.weight": torch.randn(512, 1024),
            f"attn.to_{name}.bias": torch.randn(512),
        }
    state = {key: value.to(HALF) for key, value in half.items()}
    state |= {"norm.weight": torch.randn(1024), "norm.bias": torch.randn(1024)}
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    return file


def is_page_of(value: Tensor, file: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        begin, end = (int(word, 16) for word in span.split("-"))
        if begin <= value.data_ptr() < end:
            return name == [str(file)]
    return False


def place(file: Path, key: str) -> tuple[Path, int, tuple[int, ...]]:
    entry = read_header(file)[key]
    return file, entry.begin, entry.shape


def test_what_the_file_has_whole_is_its_pages_and_the_rest_is_read(file: Path) -> None:
    module, stored = net(), load_file(file)
    load_weights(module, file, RULES, dtype=HALF)
    assert is_page_of(module.out.weight, file)
    assert not is_page_of(module.qkv.weight, file), "three tensors of the file"
    assert not is_page_of(module.out.bias, file), "small"
    for name, want in (("out.weight", module.out.weight), ("norm.bias", module.norm.bias)):
        assert torch.equal(stored[name], want)
    whole = torch.cat([stored[f"attn.to_{name}.weight"] for name in "qkv"])
    assert torch.equal(module.qkv.weight, whole)


def test_another_precision_is_read(file: Path) -> None:
    module = net()
    load_weights(module, file, RULES, dtype=FULL)
    assert not is_page_of(module.out.weight, file)
    assert torch.equal(module.out.weight, load_file(file)["out.weight"].float())


def test_what_is_written_stays_here(file: Path) -> None:
    before = file.read_bytes()
    module, other = net(), net()
    for each in (module, other):
        load_weights(each, file, RULES, dtype=HALF)
    with torch.no_grad():
        module.out.weight.add_(1)
    assert file.read_bytes() == before
    assert torch.equal(other.out.weight, load_file(file)["out.weight"])
    assert not torch.equal(other.out.weight, module.out.weight)


def test_libraries_that_load_their_own_models_get_pages_too(file: Path) -> None:
    found = stored_tensors([file])
    assert is_page_of(found["out.weight"][...].to(dtype=HALF), file)
    assert is_page_of(found["out.weight"][...].to("cpu"), file)
    wide = found["out.weight"][...].to(dtype=FULL)
    assert torch.equal(wide, load_file(file)["out.weight"].float())


def test_what_is_not_in_the_cache_is_read(file: Path) -> None:
    where = place(file, "out.weight")  # before: who reads the header of a small file has all of it
    assert map_tensor(*where, HALF) is not None
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert map_tensor(*where, HALF) is None


def test_it_can_be_switched_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert map_tensor(*place(file, "out.weight"), HALF) is not None
    monkeypatch.setenv("SGLD_MAP_WEIGHTS", "0")
    assert map_tensor(*place(file, "out.weight"), HALF) is None


@pytest.mark.parametrize(
    ("dtype", "begin", "fits"),
    [(FULL, 0, True), (FULL, 64, True), (FULL, 8, False), (FULL, 4096 + 32, False)]
    + [(HALF, 8, True), (HALF, 4098, True), (HALF, 3, False)],
)
def test_where_numbers_lie(tmp_path: Path, dtype: torch.dtype, begin: int, fits: bool) -> None:
    """A product of one row is the same bits as that of a copy, or there is no such tensor."""
    raw = tmp_path / "raw"
    want = torch.randn(512, 1024).to(dtype)
    raw.write_bytes(b"\0" * begin + want.view(torch.uint8).numpy().tobytes())
    found = map_tensor(raw, begin, (512, 1024), dtype)
    assert (found is not None) == fits
    if found is not None:
        assert torch.equal(found, want)
        for rows in (1, 2, 33):
            x = torch.randn(rows, 1024).to(dtype)
            assert torch.equal(linear(x, found), linear(x, want))


def test_a_file_that_ends_too_early_is_an_error_of_the_reader(file: Path) -> None:
    entry = read_header(file)["out.weight"]
    os.truncate(file, entry.begin + 5000)
    with pytest.raises(SetupError, match="damaged"):
        load_weights(net(), file, RULES, dtype=HALF)
