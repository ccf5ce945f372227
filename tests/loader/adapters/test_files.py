"""Files that lie about themselves, or are no adapters, never reach the reader of tensors."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.files import MOST_HEADER, check_header, read_file


def _file(folder: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(start: int, stop: int, shape: object = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD = _entry(0, 8)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": _entry(0, 800, [200])}, "ends after the end"),
        ({"a": _entry(0, 8, [3])}, "does not fit its shape"),
        ({"a": _entry(8, 0)}, "does not fit its shape"),
        ({"a": _entry(-8, 0)}, "does not fit its shape"),
        ({"a": _entry(0, 8, [-2])}, "does not fit its shape"),
        ({"a": _entry(0, 8, [2.0])}, "does not fit its shape"),
        ({"a": _entry(0, 8, [2**62, 2**62])}, "does not fit its shape"),
        ({"a": GOOD, "b": _entry(4, 12)}, "shares bytes"),
        ({"a": _entry(0, 8, dtype="F31")}, "has the type F31"),
        ({"a": []}, "does not fit its shape"),
        ({"a" * 1001: GOOD}, "has 1001 characters"),
        ({"__metadata__": {"a": 1}}, "notes"),
        ([1], "not a JSON object"),
        (b"{", "not a JSON object"),
        (b"[" * 200_000, "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
    ],
)
def test_lying_headers(header: object, why: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        check_header(_file(tmp_path, header, bytes(16)))
    assert caught.value.code == "invalid_lora"


@pytest.mark.parametrize("length", [MOST_HEADER + 1, 10_000_000_000, 2**64 - 1])
def test_a_huge_header_is_not_read(length: int, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"{length} bytes, at most {MOST_HEADER}"):
        read_file(_file(tmp_path, b"{}", length=length))


def test_cut_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the whole file"):
        read_file(_file(tmp_path, b"{}", length=500))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for data, why in ((b"", "is empty"), (b"abc", "it has 3 bytes"), (pointer, "of Git LFS")):
        (tmp_path / "b.safetensors").write_bytes(data)
        with pytest.raises(RequestError, match=f"damaged: .*{why}"):
            read_file(tmp_path / "b.safetensors")
    with pytest.raises(RequestError, match="No such file"):
        read_file(tmp_path / "c.safetensors")


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="not a regular file"):
        read_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(value: float, tmp_path: Path) -> None:
    save_file({"a.alpha": torch.tensor(value)}, tmp_path / "a.safetensors")
    with pytest.raises(RequestError, match="a.alpha holds values that are not finite"):
        read_file(tmp_path / "a.safetensors")


def test_values_whose_sum_is_too_large_are_finite(tmp_path: Path) -> None:
    largest = torch.full((8,), torch.finfo(torch.float32).max)
    save_file({"a": largest}, tmp_path / "a.safetensors")
    assert read_file(tmp_path / "a.safetensors").tensors["a"].equal(largest)


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, path, metadata={"x": "y"})
    file = read_file(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert file.metadata == {"x": "y"}
    assert file.tensors["a"].equal(torch.ones(4))
    assert file.tensors["a"].untyped_storage().nbytes() == 16


def test_types_are_widened_without_loss(tmp_path: Path) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        values = every.view(kind)
        values = values[values.float().isfinite()].contiguous()
        save_file({"a": values}, tmp_path / "a.safetensors")
        read = read_file(tmp_path / "a.safetensors").tensors["a"]
        assert read.dtype == torch.bfloat16 and read.float().equal(values.float())
    save_file({"a": torch.ones(2, dtype=torch.float64)}, tmp_path / "a.safetensors")
    assert read_file(tmp_path / "a.safetensors").tensors["a"].dtype == torch.float32
