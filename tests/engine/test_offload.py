"""Offload on a CPU has nothing to move, and says so; a GPU gets no option that it would ignore."""

from __future__ import annotations

import pytest
import torch

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.engine.offload import OPTIONS, check_offload

ALL = EngineOptions(**dict.fromkeys(OPTIONS, True))


def test_a_cpu_has_nothing_to_move() -> None:
    assert check_offload(EngineOptions(), torch.device("cpu")) == ""
    note = check_offload(ALL, torch.device("cpu"))
    assert "nothing to move" in note
    assert all("--" + name.replace("_", "-") in note for name in OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_gpu_refuses_what_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match="whole model on the GPU") as caught:
        check_offload(EngineOptions(**{name: True}), torch.device("cuda", 0))
    assert caught.value.param == name
    assert check_offload(EngineOptions(), torch.device("cuda", 0)) == ""
