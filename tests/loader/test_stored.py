"""Tensors of a file that are read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.loader.stored import StackedTensor, stored_tensors

CPU = torch.device("cpu")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, torch.Tensor]:
    found = {
        "a": torch.randn(7, 5),
        "b": torch.randn(3).bfloat16(),
        "c": torch.tensor(2.0),
        "d": torch.arange(4),
    }
    save_file({name: found[name] for name in "abd"}, tmp_path / "1.safetensors")
    save_file({"c": found["c"]}, tmp_path / "2.safetensors")
    return found


def test_every_tensor_is_what_the_files_hold(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    found = stored_tensors(sorted(tmp_path.glob("*.safetensors")))
    assert sorted(found) == ["a", "b", "c", "d"]
    for name, value in values.items():
        read = found[name][...].to(dtype=value.dtype)
        assert read.dtype == value.dtype
        assert torch.equal(read, value)


@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_precision_changes_as_torch_does_it(
    values: dict[str, torch.Tensor], wanted: torch.dtype, tmp_path: Path
) -> None:
    for name, stored in stored_tensors([tmp_path / "1.safetensors"]).items():
        read = stored[...].to("cpu", wanted)
        assert read.dtype == wanted
        assert torch.equal(read, values[name].to(wanted))


@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_of_several_files_as_one(wanted: torch.dtype, tmp_path: Path) -> None:
    parts = {name: torch.randn(2 + (name[0] == "b"), 4) for name in ("a0", "b0", "a1", "b1")}
    for index in "01":
        mine = {name: value for name, value in parts.items() if name.endswith(index)}
        save_file(mine, tmp_path / f"{index}.safetensors")
    stored = stored_tensors(sorted(tmp_path.glob("*.safetensors")))
    read = StackedTensor([[stored["a0"], stored["b0"]], [stored["a1"], stored["b1"]]])[...]
    joined = [torch.cat([parts["a0"], parts["b0"]]), torch.cat([parts["a1"], parts["b1"]])]
    assert torch.equal(read.to(CPU, wanted), torch.stack(joined).to(wanted))
    with pytest.raises(ValueError, match="rows of different shapes"):
        StackedTensor([[stored["a0"]], [stored["b1"]]])


def test_weights_do_not_change_with_their_file(
    values: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "1.safetensors"
    read = stored_tensors([file])["a"][...].to(dtype=torch.float32)
    with file.open("r+b") as handle:
        handle.seek(8 + int.from_bytes(handle.read(8), "little"))
        handle.write(bytes(file.stat().st_size - handle.tell()))
    assert not stored_tensors([file])["a"][...].to(dtype=torch.float32).any()
    assert torch.equal(read, values["a"])


def test_numbers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "1.safetensors")
    with pytest.raises(SetupError, match="holds a as F8_E4M3, which cannot be loaded"):
        stored_tensors([tmp_path / "1.safetensors"])
