"""Adapters of the model's own folder, named by a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_diffusion.base.lora import settings_to_begin_with
from sgl_diffusion.engine.lora.control import by_name
from sgl_diffusion.engine.lora.fit import Source


def test_a_name_stands_for_the_file_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    beside = [Source("night", "/model/adapters/night.safetensors")]
    given = settings_to_begin_with(("night", "org/ink"), (), (0.5, 1.0))
    first, second = by_name(given, beside, renamed=False)
    assert (first.nickname, first.path, first.strength) == ("night", beside[0].path, 0.5)
    assert second == given[1]
    named = settings_to_begin_with(("night",), ("moon",))
    (only,) = by_name(named, beside, renamed=True)
    assert (only.nickname, only.path) == ("moon", beside[0].path)
    (tmp_path / "night").mkdir()
    assert by_name(named, beside, renamed=True) == named
