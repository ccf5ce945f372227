"""Names of devices and precisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sgl_diffusion.base.device import dtype_name, pick_device, pick_dtype, unused_gpu
from sgl_diffusion.base.errors import ConfigError

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match="Device 'cuda' cannot be used"):
        pick_device("cuda")
    for name in ("gpu", "cpu:1", "cuda:x", ""):
        with pytest.raises(ConfigError, match="There is no device"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == pick_device("cuda") == GPU
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"there are 2 GPUs.*cuda:1"):
        pick_device("cuda:2")


def test_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("fp16", CPU) == torch.float16
    assert pick_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert pick_dtype("auto", GPU) == torch.bfloat16
    assert pick_dtype("auto", GPU, auto="fp32") == torch.float32
    assert pick_dtype("bf16", GPU, auto="fp32") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_dtype("auto", GPU) == torch.float16
    with pytest.raises(ConfigError, match="Did you mean 'fp16'"):
        pick_dtype("f16", CPU)


def test_names_of_dtypes() -> None:
    for name in ("fp32", "bf16", "fp16"):
        assert dtype_name(pick_dtype(name, CPU)) == name
    with pytest.raises(AssertionError):
        dtype_name(torch.int64)


def test_a_gpu_that_auto_cannot_use_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    assert unused_gpu("auto", driver) == ""
    driver.write_text("NVRM version: NVIDIA UNIX Module  535.1  date\n")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = unused_gpu("auto", driver)
    assert "driver 535.1, but this torch is for CPUs only: running on the CPU" in told
    assert "sglang doctor" in told and unused_gpu("cpu", driver) == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch for CUDA 13.0 finds no GPU" in unused_gpu("auto", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unused_gpu("auto", driver) == ""
