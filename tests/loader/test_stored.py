"""Tensors of a file that are read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.stored import stored_tensors


@pytest.fixture
def values(tmp_path: Path) -> dict[str, torch.Tensor]:
    found = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.tensor(2.0)}
    save_file({name: found[name] for name in "ab"}, tmp_path / "1.safetensors")
    save_file({"c": found["c"]}, tmp_path / "2.safetensors")
    return found


def test_every_tensor_is_what_the_files_hold(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    found = stored_tensors(sorted(tmp_path.glob("*.safetensors")))
    assert sorted(found) == ["a", "b", "c"]
    for name, value in values.items():
        assert found[name][...].dtype == value.dtype
        assert torch.equal(found[name][...], value)
    assert torch.equal(found["a"][2:4], values["a"][2:4])


def test_weights_do_not_change_with_their_file(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "1.safetensors"
    read = stored_tensors([file])["a"][...]
    with file.open("r+b") as handle:
        handle.seek(-values["a"].nbytes, 2)
        handle.write(bytes(values["a"].nbytes))
    assert torch.equal(read, values["a"])


def test_numbers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "1.safetensors")
    with pytest.raises(SetupError, match="holds a as F8_E4M3, which cannot be loaded"):
        stored_tensors([tmp_path / "1.safetensors"])
