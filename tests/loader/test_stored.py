"""Tensors of a file that are read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgl_diffusion.loader import stored
from sgl_diffusion.loader.stored import stored_tensors


@pytest.fixture
def values(tmp_path: Path) -> dict[str, torch.Tensor]:
    found = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.tensor(2.0)}
    save_file({name: found[name] for name in "ab"}, tmp_path / "1.safetensors")
    save_file({"c": found["c"]}, tmp_path / "2.safetensors")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_what_the_files_hold(
    dtype: torch.dtype,
    values: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "_MAPPED_NUMBERS", 4)  # so that a copy takes several parts
    found = stored_tensors(sorted(tmp_path.glob("*.safetensors")), dtype)
    assert sorted(found) == ["a", "b", "c"]
    for name, value in values.items():
        assert found[name][...].dtype == value.dtype
        assert torch.equal(found[name][...], value)


def test_weights_do_not_change_with_their_file(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "1.safetensors"
    read = stored_tensors([file], torch.float32)["a"][...]
    with file.open("r+b") as handle:
        handle.seek(-values["a"].nbytes, 2)
        handle.write(bytes(values["a"].nbytes))
    assert torch.equal(read, values["a"])
