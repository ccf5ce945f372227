"""The native library is used when it fits the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_diffusion.base import native
from sgl_diffusion.base.errors import ConfigError


def test_a_library_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "is not built" in native.load(tmp_path / "libsgld.so")


def test_a_file_that_is_no_library_is_told(tmp_path: Path) -> None:
    file = tmp_path / "libsgld.so"
    file.write_text("no library")
    assert "cannot be loaded" in native.load(file)


@pytest.mark.skipif(bool(native.absent()), reason=native.absent() or "built")
def test_a_library_of_older_code_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load(native.path()) == ""
    monkeypatch.setattr(native, "_NEWEST", "an_op_to_come")
    assert "is older than this code" in native.load(native.path())
    monkeypatch.setenv("SGLD_LIBRARY", str(native.path()))
    with pytest.raises(ConfigError, match="older"):
        native.load(native.path())
